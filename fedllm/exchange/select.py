"""Partial participation: which clients a round asks. Pure functions of seed and round."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.core.types import Select


def everyone(clients: Sequence[str]) -> Select:
    """Ask every client in every round."""
    return lambda round_number: clients


def fixed_size(clients: Sequence[str], size: int, seed: int = 0) -> Select:
    """Ask `size` clients a round, drawn uniformly without replacement."""
    if not 1 <= size <= len(clients):
        raise FedllmError(f"select.size is {size}; it must be between 1 and the {len(clients)} silos.")

    def select(round_number: int) -> list[str]:
        order = torch.randperm(len(clients), generator=generator(seed, "select", round_number))
        return [clients[i] for i in sorted(order[:size].tolist())]

    return select


def cyclic(clients: Sequence[str], every: int) -> Select:
    """Ask each client every `every` rounds, always in the same order: nothing is left to chance."""
    if not 1 <= every <= len(clients):
        raise FedllmError(f"select.every is {every}; it must be between 1 and the {len(clients)} silos.")
    return lambda round_number: clients[round_number % every :: every]


def poisson(clients: Sequence[str], rate: float, seed: int = 0) -> Select:
    """Ask each client with probability `rate`, independently; a round may ask nobody."""
    if not 0 < rate <= 1:
        raise FedllmError(f"select.rate is {rate}; it must be above 0 and at most 1.")

    def select(round_number: int) -> list[str]:
        draws = torch.rand(len(clients), dtype=torch.float64, generator=generator(seed, "select", round_number))
        return [name for name, draw in zip(clients, draws.tolist(), strict=True) if draw < rate]

    return select
