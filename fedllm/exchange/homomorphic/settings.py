"""What a recipe says of homomorphic encryption, and which tensors it means.

FedML-HE (Jin et al. 2023, arXiv:2303.10837) encrypts the parameters that are most sensitive by a map that silos make of
their text. Here whole tensors are chosen by name, before a run: no message of their own is needed for it. Which ones an
audit of a rehearsal says, by that map (`audit/sensitivity.py`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Literal, NamedTuple

from fedllm.core.errors import FedllmError

MOST_SILOS = 1024
"""In a sum: weights and tags of more have no room."""

OPENERS = 2
"""Silos that open each sum, and have to find the same."""


class Settings(NamedTuple):
    """What a recipe says of homomorphic encryption."""

    tensors: Sequence[str] = ("*",)
    """Patterns of the names of those that are encrypted; the others travel as they are."""
    least: int = 3
    """Silos that a sum has at least."""
    bits: Literal[16, 32] = 32
    """Of each number; with 16 two of them are encrypted as one."""
    largest_weight: float = 10_000
    """The most that a silo may weigh (examples, or tokens); what is above counts as this."""
    largest_value: float | None = None
    """The most that a single value of an update may be, where that is less than the update's norm may be."""


def require_settings(settings: Settings) -> None:
    """Raise for settings that cannot be meant."""
    for key, floor in {"least": 3, "largest_weight": 1}.items():
        if not getattr(settings, key) >= floor:
            raise FedllmError(f"homomorphic.{key} is {getattr(settings, key):g}; it must be at least {floor}.")
    if settings.largest_weight > 2**20:
        raise FedllmError(f"homomorphic.largest_weight is {settings.largest_weight:g}; it must be at most {2**20:,}.")
    if settings.largest_value is not None and not settings.largest_value > 0:
        raise FedllmError(f"homomorphic.largest_value is {settings.largest_value:g}; it must be above 0.")


def hidden(settings: Settings, names: Iterable[str]) -> list[str]:
    """Return the names of the tensors that are encrypted, in rising order.

    >>> hidden(Settings(tensors=["*.lora_B.*"]), ["q.lora_B.weight", "q.lora_A.weight"])
    ['q.lora_B.weight']
    """
    return sorted(name for name in names if any(fnmatchcase(name, pattern) for pattern in settings.tensors))
