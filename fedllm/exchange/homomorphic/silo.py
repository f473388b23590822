"""The silo's half: it encrypts its update, and opens a sum in which it is, each once a round."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.noise import key_of, require_float32
from fedllm.core.types import Client, Cohort, Reply, Request, Silo, Tensors
from fedllm.exchange.homomorphic.ckks import Keys, Numbers, decrypted, encrypted, require_ciphertexts
from fedllm.exchange.homomorphic.messages import CIPHER, OPEN, OPENED, PART, TRAIN, Terms, members_of, terms_of
from fedllm.exchange.homomorphic.packing import (
    BESIDE,
    laid_out,
    numbers_for,
    paired,
    rows_for,
    tags_of,
    taken_apart,
)
from fedllm.exchange.homomorphic.settings import Settings, hidden
from fedllm.exchange.phases import answered, remembering, trained, without_ours
from fedllm.exchange.secure.fixed_point import Grid, grid, rounded


class Made(NamedTuple):
    """How a run's updates become numbers: the same at all silos."""

    settings: Settings
    weighted: bool
    """Whether a silo counts by its weight; else all alike."""
    largest: float
    """Of one silo's values."""
    like: Callable[[int], Tensors]
    """What an update of a round looks like."""

    def grid(self, silos: int) -> Grid:
        """Return the grid of a sum of at most so many silos."""
        try:
            return grid(self.settings.bits, self.largest, silos)
        except FedllmError as error:
            raise Refused(str(error)) from error

    def encrypted_values(self, number: int) -> int:
        """Return how many values of a round's update are encrypted."""
        like = self.like(number)
        return sum(like[name].numel() for name in hidden(self.settings, like))


def homomorphic_client(inner: Client, made: Made, keys: Callable[[], Keys], key: bytes, secret: bytes) -> Client:
    """Let a client encrypt what it replies; what else it is asked to do it does as before.

    `keys` are those that all silos have, made of their `key` when first needed; chance comes from its own `secret`.
    """

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        if request.op not in (TRAIN, OPEN):
            return inner(request, silo)
        if said := answered(PART, request, silo):
            return Reply(request.client, request.round, said, 1.0), silo.memory
        if request.op == OPEN:
            said = told(request, silo, made, keys(), key)
            return Reply(request.client, request.round, said, 1.0), remembering(PART, request, silo, said)
        terms = terms_of(request)
        reply, kept = inner(without_ours(PART, request), silo)
        sent = closed(terms, silo, reply, made, keys(), key, secret)
        return Reply(request.client, request.round, sent, 1.0), trained(PART, request, silo, kept)

    return client


def homomorphic_cohort(inner: Cohort, made: Made, keys: Callable[[], Keys], key: bytes, secret: bytes) -> Cohort:
    """Let many clients train as one batch, each encrypting its own."""

    def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        if any(request.op != TRAIN for request, _ in members):
            return [homomorphic_client(alone, made, keys, key, secret)(*member) for member in members]
        trainees = [(without_ours(PART, request), silo) for request, silo in members]
        answers = iter(inner(trainees))
        # The batch is done: each silo's client finds its own answer there.
        return [homomorphic_client(lambda *_: next(answers), made, keys, key, secret)(*member) for member in members]

    def alone(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        return inner([(request, silo)])[0]

    return cohort


def closed(
    terms: Terms, silo: Silo, reply: Reply, made: Made, keys: Keys, key: bytes, secret: bytes
) -> dict[str, Tensor]:
    """Return an update, times its weight, as whole numbers, those of hidden tensors as ciphertexts."""
    require_float32(reply.tensors)
    settings, names = made.settings, sorted(reply.tensors)
    values = np.concatenate([reply.tensors[name].detach().cpu().numpy().ravel() for name in names])
    most = int(settings.largest_weight)
    weight = min(max(round(reply.weight), 1), most) if made.weighted else 1
    own = key_of(secret, "homomorphic rounding", silo.name, silo.seed, terms.round, terms.nonce)
    numbers, _ = rounded(values, made.grid(terms.asked), weight / most if made.weighted else 1.0, own)
    signed = numbers.view(np.int16 if settings.bits == 16 else np.int32)
    pieces = np.split(signed, np.cumsum([reply.tensors[name].numel() for name in names])[:-1])
    by_name = dict(zip(names, pieces, strict=True))
    inside = np.concatenate([[], *(by_name.pop(name) for name in hidden(settings, names))]).astype(np.int64)
    whole = np.concatenate([[1, weight], paired(inside, settings.bits)])
    tags = tags_of(key, terms, [silo.name], rows_for(len(inside), settings.bits))
    clear = {name: torch.from_numpy(piece).view(reply.tensors[name].shape) for name, piece in by_name.items()}
    return {**clear, CIPHER: torch.from_numpy(encrypted(keys, laid_out(whole, tags)))}


def told(request: Request, silo: Silo, made: Made, keys: Keys, key: bytes) -> dict[str, Tensor]:
    """Return the numbers of a sum of enough silos, this one among them, if its tags say that it is that sum."""
    terms = terms_of(request)
    names = members_of(request, silo.name, made.settings.least, terms)
    values, bits = made.encrypted_values(request.round), made.settings.bits
    slots = decrypted(keys, ciphertexts(request.tensors, rows_for(values, bits)))
    numbers, tags = taken_apart(slots, BESIDE + numbers_for(values, bits))
    if not np.array_equal(tags, tags_of(key, terms, names, len(tags))):
        raise Refused("the sum is not of the silos and the round that it is said to be of, or a silo has another key")
    return {OPENED: torch.from_numpy(numbers.astype(np.int32))}


def ciphertexts(tensors: Tensors, rows: int) -> Numbers:
    """Return the ciphertexts in a message, or raise `Refused`."""
    value = tensors.get(CIPHER)
    if value is None or value.dtype != torch.int64:
        raise Refused("it has no ciphertexts")
    numbers: Numbers = value.contiguous().numpy()
    require_ciphertexts(numbers, rows)
    return numbers
