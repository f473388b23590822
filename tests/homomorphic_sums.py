"""A homomorphic sum of small silos, with whatever may go wrong on the way, for tests."""

from __future__ import annotations

import torch

from fedllm.core.types import Reply, Request, Silo
from fedllm.exchange.homomorphic.middleware import homomorphic_sum
from fedllm.exchange.homomorphic.settings import Settings

LIKE = {"a": torch.zeros(5, 3), "b": torch.zeros(4)}

KEY, SECRET = b"k" * 32, b"s" * 32

USUAL = Settings(largest_weight=50)


def names_of(count):
    return [f"s{number:02}" for number in range(count)]


def update(name, number=0):
    generator = torch.Generator().manual_seed(1000 * number + int(name[1:]))
    return {key: torch.randn(value.shape, generator=generator) / 10 for key, value in LIKE.items()}


def silo_of(name, memory=None):
    return Silo(name, None, {}, memory or {}, int(name[1:]))


class Wire:
    """An exchange with silos in this process; `fault(op, replies)` says what arrives of the replies of a phase."""

    def __init__(self, settings=USUAL, weight=lambda name: 1.0, weighted=True, fault=None, key=KEY, like=LIKE):
        self.fault, self.memory, self.seen, self.weight = fault, {}, [], weight
        self.layer = homomorphic_sum(settings, key, SECRET, 1.0, lambda number: like, weighted)
        self.client = self.layer.client(self.train)

    def train(self, request, silo):
        assert not any(name.startswith("homomorphic/") for name in request.tensors)
        made = update(silo.name, request.round)
        return Reply(silo.name, request.round, made, self.weight(silo.name), {"train_loss": 1.0}), {"work/x": LIKE["b"]}

    def answer(self, request):
        reply, kept = self.client(request, silo_of(request.client, self.memory.get(request.client)))
        self.memory[request.client] = kept
        return reply

    def exchange(self, requests):
        replies = [self.answer(request) for request in requests]
        self.seen += list(zip(requests, replies, strict=True))
        yield from self.fault(requests[0].op, replies) if self.fault else replies

    def round(self, names, number=0):
        """Let the server's half add up; its one reply."""
        (reply,) = self.layer.exchange(self.exchange)([Request(name, number, "train", LIKE) for name in names])
        return reply


def plain_mean(members, number=0, weight=lambda name: 1.0):
    """What the mean is without any of it."""
    total = sum(weight(name) for name in members)
    return {key: sum(update(name, number)[key].double() * weight(name) for name in members) / total for key in LIKE}
