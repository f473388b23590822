"""The server's half: it adds up what it cannot read, and lets two silos open the sum, which have to agree."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch

from fedllm.core.errors import Refused
from fedllm.core.noise import key_of
from fedllm.core.types import Exchange, Reply, Request, Tensors
from fedllm.exchange.homomorphic.ckks import DEGREE, Numbers, add
from fedllm.exchange.homomorphic.messages import CIPHER, OPEN, OPENED, TRAIN, Terms, members, written
from fedllm.exchange.homomorphic.packing import BESIDE, numbers_for, rows_for, unpaired
from fedllm.exchange.homomorphic.settings import MOST_SILOS, OPENERS, hidden
from fedllm.exchange.homomorphic.silo import Made, ciphertexts


class Sum(NamedTuple):
    """A round's sum: what is encrypted of it and what is not, and whose it is."""

    cipher: Numbers
    clear: dict[str, Numbers]
    kept: list[str]


def homomorphic_exchange(exchange: Exchange, made: Made, secret: bytes) -> Exchange:
    """Let only the mean of all updates through; the server's `secret` makes each round's nonce another one."""

    def exchanged(requests: Sequence[Request]) -> Iterator[Reply]:
        train = [request for request in requests if request.op == TRAIN]
        if rest := [request for request in requests if request.op != TRAIN]:
            yield from exchange(rest)
        if train:
            lost = dict[str, str]()
            try:
                reply = summed(train, exchange, made, secret, lost)
            except Refused as problem:
                reply = Reply("", train[0].round, {}, 0.0)
                lost = {**{request.client: f"no sum: {problem}" for request in train}, **lost}
            yield reply._replace(lost=lost)

    return exchanged


def summed(requests: Sequence[Request], exchange: Exchange, made: Made, secret: bytes, lost: dict[str, str]) -> Reply:
    """Return the mean by weight of the silos' updates; say in `lost` who is not in it, and why.

    Raises:
        Refused: where too few silos are left, or those that open the sum do not find the same: then nothing is told.
    """
    number = requests[0].round
    terms = Terms(number, key_of(secret, "homomorphic nonce", number), len(requests))
    if not made.settings.least <= len(requests) <= MOST_SILOS:
        raise Refused(f"{len(requests)} silos were asked, and a sum is of {made.settings.least} to {MOST_SILOS}")
    total = taken(requests, exchange, made, terms, lost)
    if len(total.kept) < made.settings.least:
        raise Refused(f"{len(total.kept)} silos are left and homomorphic.least is {made.settings.least}")
    return told(total, opened(total, exchange, made, terms), made, terms)


def taken(requests: Sequence[Request], exchange: Exchange, made: Made, terms: Terms, lost: dict[str, str]) -> Sum:
    """Let them train, and add up what comes."""
    like, settings = made.like(terms.round), made.settings
    rows = rows_for(made.encrypted_values(terms.round), settings.bits)
    plain = {name: value for name, value in like.items() if name not in hidden(settings, like)}
    total = Sum(np.zeros((rows, 2, DEGREE), np.int64), {n: np.zeros(v.shape, np.int64) for n, v in plain.items()}, [])
    whole, asked = dict[int, Tensors](), list[Request]()
    for request in requests:
        # The same weights go to many silos, and are packed once if they are the same object.
        tensors = whole.setdefault(id(request.tensors), {**request.tensors, **written(terms)})
        asked.append(request._replace(tensors=tensors))
    grid = made.grid(terms.asked)
    most = int(grid.largest / grid.step) + 1
    for name, reply in heard(exchange, asked, lost, "its update"):
        try:
            cipher, clear = ciphertexts(reply.tensors, rows), numbers_of(reply.tensors, plain, settings.bits, most)
        except Refused as problem:
            lost[name] = str(problem)
            continue
        add(total.cipher, cipher)
        for each, numbers in clear.items():
            total.clear[each] += numbers
        total.kept.append(name)
        del reply, cipher, clear
    total.kept.sort()
    return total


def heard(
    exchange: Exchange, requests: Sequence[Request], lost: dict[str, str], what: str
) -> Iterator[tuple[str, Reply]]:
    """Yield the first reply of each silo that was asked, in its round; note those who send none."""
    waiting, number = {request.client for request in requests}, requests[0].round
    for reply in exchange(requests):
        if reply.client in waiting and reply.round == number:
            waiting.discard(reply.client)
            yield reply.client, reply
    for name in sorted(waiting):
        lost.setdefault(name, f"{what} did not come")


def numbers_of(tensors: Tensors, like: Tensors, bits: int, most: int) -> dict[str, Numbers]:
    """Return the numbers of the tensors that are not encrypted, or raise `Refused` where they do not look like it."""
    kind = torch.int16 if bits == 16 else torch.int32
    expected = {name: (value.shape, kind) for name, value in like.items()}
    found = {name: (value.shape, value.dtype) for name, value in tensors.items() if name != CIPHER}
    if found != expected:
        odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise Refused(f"its update has not the names, shapes and types that were expected, such as '{odd[0]}'")
    numbers = {name: tensors[name].contiguous().numpy().astype(np.int64) for name in like}
    if any(value.size and int(np.abs(value).max()) > most for value in numbers.values()):
        raise Refused("a value of its update is beyond the largest")
    return numbers


def opened(total: Sum, exchange: Exchange, made: Made, terms: Terms) -> Numbers:
    """Return the numbers of the sum as two of its silos found them, others each round, or raise `Refused`."""
    count = BESIDE + numbers_for(made.encrypted_values(terms.round), made.settings.bits)
    first = terms.round % len(total.kept)
    waiting = [*total.kept[first:], *total.kept[:first]]
    tensors = written(terms, cipher=torch.from_numpy(total.cipher)) | members(total.kept)
    found, missing = dict[str, Numbers](), dict[str, str]()
    while waiting and len(found) < OPENERS:
        asked, waiting = waiting[: OPENERS - len(found)], waiting[OPENERS - len(found) :]
        requests = [Request(name, terms.round, OPEN, tensors) for name in asked]
        for name, reply in heard(exchange, requests, missing, "its opening of the sum"):
            value = reply.tensors.get(OPENED)
            if value is None or value.dtype != torch.int32 or tuple(value.shape) != (count,):
                missing[name] = "what it sent is no opening of the sum"
                continue
            found[name] = value.numpy().astype(np.int64)
    if len(found) < OPENERS:
        why = "; ".join(f"{name}: {reason}" for name, reason in missing.items())
        raise Refused(f"{len(found)} silos opened the sum and {OPENERS} have to ({why})")
    for one, other in pairwise(found):
        if not np.array_equal(found[one], found[other]):
            raise Refused(f"'{one}' and '{other}' find different numbers in one sum: one of them is wrong")
    return next(iter(found.values()))


def told(total: Sum, numbers: Numbers, made: Made, terms: Terms) -> Reply:
    """Return the mean, if the sum says itself that it is one of these silos."""
    like, settings = made.like(terms.round), made.settings
    count, weight = (int(each) for each in numbers[:BESIDE])
    most = int(settings.largest_weight) if made.weighted else 1
    if count != len(total.kept) or not count <= weight <= count * most:
        raise Refused(f"the sum says that it is of {count} silos that weigh {weight}, and it is of {len(total.kept)}")
    inside = unpaired(numbers[BESIDE:], made.encrypted_values(terms.round), settings.bits)
    names = hidden(settings, like)
    pieces = np.split(inside, np.cumsum([like[name].numel() for name in names])[:-1]) if names else []
    sums = {**total.clear, **dict(zip(names, pieces, strict=True))}
    worth = made.grid(terms.asked).step * (most / weight)
    tensors = {
        name: torch.from_numpy((sums[name] * worth).astype(np.float32)).view(value.shape)
        for name, value in like.items()
    }
    return Reply("the sum", terms.round, tensors, float(weight), of=total.kept)
