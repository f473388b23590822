"""The plan check: follow what is known of an update through the round before anything runs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.core.types import Algorithm, Facts, Tensors, on_meta


class Known(NamedTuple):
    """One step of the round and what is known of the update after it."""

    where: str
    name: str
    facts: Facts


class Plan(NamedTuple):
    """A round that fits: its steps and what it costs."""

    steps: list[Known]
    parameters: int
    bytes_down: int
    bytes_up: int


def plan(algorithm: Algorithm, params: Tensors) -> Plan:
    """Check that the parts of an algorithm fit and say what is known after each step; nothing runs.

    Sizes are of one client in one round, tensors only: what the wire adds is under one kilobyte a
    tensor. Raises `FedllmError` with the remedy where a part's needs are not met.
    """
    facts, steps = Facts(), []
    for step in algorithm.steps:
        facts = step.claim(facts)
        steps.append(Known(step.where, step.name, facts))
    like = on_meta(params)
    return Plan(
        steps,
        sum(value.numel() for value in params.values()),
        size(algorithm.down(like).values()),
        size(algorithm.wire(like).values()),
    )


def size(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the tensors' numbers."""
    return sum(value.numel() * torch.empty((), dtype=value.dtype).element_size() for value in tensors)
