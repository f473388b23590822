"""A secure sum of small silos, with whatever may go wrong on the way, for tests."""

from __future__ import annotations

import torch

from fedllm.core.types import Reply, Request, Silo
from fedllm.exchange.secure.fixed_point import grid
from fedllm.exchange.secure.messages import SHARES
from fedllm.exchange.secure.middleware import secure_sum
from fedllm.exchange.secure.settings import Settings

LIKE = {"a": torch.zeros(5, 3), "b": torch.zeros(4)}

SECRET = b"s" * 32

USUAL = Settings()


def names_of(count):
    return [f"s{number:02}" for number in range(count)]


def silo_of(name, memory):
    return Silo(name, None, {}, memory, int(name[1:]))


def whole(name, number=0):
    """A silo's update in whole steps, so that rounding by chance changes nothing."""
    generator = torch.Generator().manual_seed(1000 * number + int(name[1:]))
    return {key: torch.randint(-50, 50, value.shape, generator=generator) for key, value in LIKE.items()}


class Wire:
    """An exchange with silos in this process; `fault(op, replies)` says what arrives of the replies of a phase."""

    def __init__(self, settings=USUAL, bound=1.0, weight=lambda name: 1.0, weighted=False, fault=None, noise=None):
        self.settings, self.fault, self.memory, self.seen = settings, fault, {}, []
        self.weight, self.bound = weight, bound
        self.layer = secure_sum(settings, SECRET, bound, lambda number: LIKE, weighted, noise)
        self.client = self.layer.client(self.train)
        self.step = None

    def train(self, request, silo):
        assert not any(name.startswith("secure/") for name in request.tensors)
        update = {key: value * self.step for key, value in whole(silo.name, request.round).items()}
        update = {key: value.float() for key, value in update.items()}
        return Reply(silo.name, request.round, update, self.weight(silo.name), {"train_loss": 1.0}), {
            "work/x": LIKE["b"]
        }

    def answer(self, request):
        reply, kept = self.client(request, silo_of(request.client, self.memory.get(request.client, {})))
        self.memory[request.client] = kept
        return reply

    def exchange(self, requests):
        if requests[0].op == SHARES:
            self.step = grid(self.settings.bits, self.bound, len(requests) // self.settings.groups).step
        replies = [self.answer(request) for request in requests]
        self.seen += list(zip(requests, replies, strict=True))
        yield from self.fault(requests[0].op, replies) if self.fault else replies

    def rounds(self, names, number=0):
        """Let the server's half add up; its replies, one a group."""
        return list(self.layer.exchange(self.exchange)([Request(name, number, "train", LIKE) for name in names]))

    def round(self, names, number=0):
        """Let the server's half add up; its one reply."""
        (reply,) = self.rounds(names, number)
        return reply


def plain_mean(members, step, number=0, weight=lambda name: 1.0):
    """What the mean is without any of it."""
    total = sum(weight(name) for name in members)
    sums = {key: sum(whole(name, number)[key] * weight(name) for name in members) for key in LIKE}
    return {key: (value.double() * step / total).float() for key, value in sums.items()}
