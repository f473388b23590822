"""The silo's half: it makes keys, shares them out, masks its update and helps to unmask the sum, each once a round.

What it keeps secret comes from its own secret and the round, and what others entrusted to it comes back to it sealed,
so that nothing has to be remembered but what was answered already. A silo trusts the server with nothing: it answers
each phase once a round, for one set of silos, and tells one kind of share of each silo only.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.noise import key_of, require_float32
from fedllm.core.types import Client, Cohort, Reply, Request, Silo, Tensors
from fedllm.exchange.looking import LOSS
from fedllm.exchange.phases import answered, remembering, trained, without_ours
from fedllm.exchange.secure.beside import beside
from fedllm.exchange.secure.fixed_point import Grid, rounded
from fedllm.exchange.secure.graph import neighbours_of
from fedllm.exchange.secure.keys import (
    KEY_BYTES,
    Own,
    agreed,
    commitment,
    derived,
    own_keys,
    sealed,
    unsealed,
)
from fedllm.exchange.secure.masks import Mask, Numbers, masked
from fedllm.exchange.secure.messages import (
    KEYS,
    PART,
    SHARES,
    SUM,
    TAIL,
    TRAIN,
    Directory,
    as_tensor,
    boxes_of,
    chosen_of,
    context_of,
    read_directory,
)
from fedllm.exchange.secure.noise import discrete_gaussian
from fedllm.exchange.secure.settings import Circle, Settings, circle
from fedllm.exchange.secure.shares import split

BAD = bytes(KEY_BYTES)
"""In place of a share whose box was not what it was said to be."""


class Made(NamedTuple):
    """How a run's updates become numbers: pure functions of a round's circle, the same at all silos."""

    settings: Settings
    weighted: bool
    """Whether a silo counts by its weight; else all alike."""
    grid: Callable[[Circle], Grid]
    noise: Callable[[Circle, int], float]
    """Standard deviation of one silo's part of the noise on an update of so many values, in steps; 0 for none."""


class Round(NamedTuple):
    """A round as one silo sees it."""

    directory: Directory
    there: set[int]
    """Those who shared out their keys."""
    circle: Circle
    place: int
    context: bytes
    graph: list[list[int]]
    keys: Own
    own_mask: bytes
    """What the silo's own mask comes from."""

    def holders(self, place: int) -> list[int]:
        """Return who holds shares of a silo's secrets: itself and its neighbours."""
        return sorted([place, *self.graph[place]])


def secure_client(inner: Client, made: Made, secret: bytes) -> Client:
    """Let a client take part in secure sums; what else it is asked to do it does as before."""

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        if request.op not in (KEYS, SHARES, TRAIN, SUM):
            return inner(request, silo)
        if said := answered(PART, request, silo):
            return Reply(request.client, request.round, said, 1.0), silo.memory
        if request.op == KEYS:
            keys = own_keys(secret, silo.name, silo.seed, request.round)
            said = {f"{PART}/keys": as_tensor([keys.channel.public, keys.mask.public], KEY_BYTES)}
            return Reply(request.client, request.round, said, 1.0), remembering(PART, request, silo, said)
        about = round_of(request, silo, made.settings, secret)
        if request.op == TRAIN:
            return ended(request, about, silo, inner(without_ours(PART, request), silo), made, secret)
        said = shared_out(about, secret) if request.op == SHARES else told(about, request, secret)
        return Reply(request.client, request.round, said, 1.0), remembering(PART, request, silo, said)

    return client


def secure_cohort(inner: Cohort, made: Made, secret: bytes) -> Cohort:
    """Let many clients train as one batch, each masking its own."""

    def alone(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        return inner([(request, silo)])[0]

    client = secure_client(alone, made, secret)

    def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        if any(request.op != TRAIN for request, _ in members):
            return [client(*member) for member in members]
        for member in members:
            answered(PART, *member)
        rounds = [round_of(request, silo, made.settings, secret) for request, silo in members]
        answers = inner([(without_ours(PART, request), silo) for request, silo in members])
        return [
            ended(request, about, silo, answer, made, secret)
            for (request, silo), about, answer in zip(members, rounds, answers, strict=True)
        ]

    return cohort


def round_of(request: Request, silo: Silo, settings: Settings, secret: bytes) -> Round:
    """Return the round that a request is about, or raise `Refused`; the graph is reckoned here, not taken over."""
    keys = own_keys(secret, silo.name, silo.seed, request.round)
    directory = read_directory(request.tensors, silo.name, (keys.channel.public, keys.mask.public))
    count, place = len(directory.names), directory.place(silo.name)
    there = set(range(count)) if request.op == SHARES else chosen_of(request.tensors, "there", count)
    try:
        now = circle(settings, count, directory.asked)
    except FedllmError as error:
        raise Refused(str(error)) from error
    require_enough(place, there, now)
    context = context_of(directory, request.round, settings)
    own = key_of(secret, "secure own mask", silo.name, silo.seed, request.round, context)
    return Round(directory, there, now, place, context, neighbours_of(count, now.neighbours, context), keys, own)


def require_enough(place: int, left: set[int], now: Circle) -> None:
    """Refuse a set of silos without this one, or from which more are missing than the settings bear."""
    if place not in left:
        raise Refused("this silo is said to be lost, and is not")
    if len(left) < now.silos - now.drop_outs:
        raise Refused(
            f"{len(left)} of {now.silos} silos are left and {now.drop_outs} may be lost; a sum of so few is not told"
        )


def shared_out(about: Round, secret: bytes) -> Tensors:
    """Phase 2: return boxes with shares of both secrets, one for each holder, and what the own mask is checked by."""
    holders, boxes = about.holders(about.place), list[bytes]()
    each = [split(part, about.circle.threshold, len(holders)) for part in (about.own_mask, about.keys.mask.private)]
    for holder, *shares in zip(holders, *each, strict=True):
        key = box_key(about, holder, secret)
        boxes.append(sealed(key, b"".join(shares), label(about, about.place, holder)))
    check = as_tensor([commitment(about.own_mask, about.context)], KEY_BYTES)
    return {f"{PART}/boxes": as_tensor(boxes, len(boxes[0])), f"{PART}/check": check}


def box_key(about: Round, other: int, secret: bytes) -> bytes:
    """Return the key of the boxes between this silo and another, or this silo and itself."""
    if other == about.place:
        return derived(key_of(secret, "secure own box", about.context), about.context, "box")
    return agreed(about.keys.channel.private, about.directory.channel[other], about.context, "box")


def label(about: Round, sender: int, receiver: int) -> bytes:
    """Return what a box is bound to: round, silos, settings and keys by the context; from whom; for whom."""
    return about.context + sender.to_bytes(4, "big") + receiver.to_bytes(4, "big")


def ended(
    request: Request, about: Round, silo: Silo, answer: tuple[Reply, Tensors], made: Made, secret: bytes
) -> tuple[Reply, Tensors]:
    """Phase 3: return the masked update, its weight and its loss, and nothing else of what the client replied."""
    reply, kept = answer
    require_float32(reply.tensors)
    names, here = sorted(reply.tensors), key_of(secret, "secure update", silo.name, silo.seed, about.context)
    values = np.concatenate([reply.tensors[name].detach().cpu().numpy().ravel() for name in names])
    grid, settings = made.grid(about.circle), made.settings
    weight = min(max(round(reply.weight), 1), int(settings.largest_weight)) if made.weighted else 1
    scale = weight / int(settings.largest_weight) if made.weighted else 1.0
    numbers, beyond = rounded(values, grid, scale, key_of(here, "rounding"))
    if deviation := made.noise(about.circle, len(values)):
        numbers += discrete_gaussian(key_of(here, "noise"), len(values), deviation).astype(numbers.dtype)
    tail = beside(weight, beyond, reply.scalars.get(LOSS), about.circle.silos, key_of(here, "no loss"))
    masks = [Mask(derived(about.own_mask, about.context, "own"), True)]
    masks += [pairwise(about, other) for other in about.graph[about.place] if other in about.there]
    masked(numbers, masks)
    masked(tail, [tail_of(mask, about.context) for mask in masks])
    sizes = [reply.tensors[name].numel() for name in names]
    pieces = np.split(as_signed(numbers), np.cumsum(sizes)[:-1])
    sent = {
        name: torch.from_numpy(piece).view(reply.tensors[name].shape) for name, piece in zip(names, pieces, strict=True)
    }
    sent[TAIL] = torch.from_numpy(as_signed(tail))
    return Reply(request.client, request.round, sent, 1.0), trained(PART, request, silo, kept)


def pairwise(about: Round, other: int) -> Mask:
    """Return the mask that this silo and another have in common: the first of the two adds it."""
    key = agreed(about.keys.mask.private, about.directory.mask[other], about.context, "mask")
    return Mask(key, about.place < other)


def tail_of(mask: Mask, context: bytes) -> Mask:
    """Return the same mask for what stands beside the update."""
    return mask._replace(key=derived(mask.key, context, "tail"))


def as_signed(numbers: Numbers) -> Numbers:
    """Return numbers in the type in which they travel."""
    return numbers.view(np.int16 if numbers.itemsize == 2 else np.int32)


def told(about: Round, request: Request, secret: bytes) -> Tensors:
    """Phase 4: return a share of each neighbour: of its own mask if it is in the sum, of its pairwise ones if not."""
    kept = chosen_of(request.tensors, "kept", about.circle.silos)
    require_enough(about.place, kept, about.circle)
    if not kept <= about.there:
        raise Refused("a silo is said to be in the sum that did not share out its keys")
    sources = [other for other in about.holders(about.place) if other in about.there]
    found = list[bytes]()
    for source, box in zip(sources, boxes_of(request.tensors, len(sources)), strict=True):
        try:
            plain = unsealed(box_key(about, source, secret), box, label(about, source, about.place))
        except Refused:
            # One silo that sealed rubbish must not keep the others from telling what they have.
            plain = BAD + BAD
        found.append(plain[:KEY_BYTES] if source in kept else plain[KEY_BYTES:])
    return {f"{PART}/shares": as_tensor(found, KEY_BYTES)}
