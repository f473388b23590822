"""A language model as prompt methods see it: text in, text or log-probabilities out; where it runs they cannot tell."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedllm.silo.scoring import Scored
from fedllm.silo.templates import Turn


class Writing(NamedTuple):
    """How a model is to write: at temperature 0 the likeliest token is always taken."""

    max_tokens: int = 256
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()


class Used(NamedTuple):
    """What was asked of a model: requests, tokens read and written, and what they cost."""

    calls: int = 0
    read: int = 0
    written: int = 0
    cost: float = 0.0


class Speaker(NamedTuple):
    """A model that may be anywhere."""

    write: Callable[[Sequence[Sequence[Turn]], Writing], list[str]]
    """What the assistant says next in each conversation."""
    score: Callable[[Sequence[tuple[str, str]]], list[Scored]] | None
    """The log-probability of each (before, after)'s `after`, in nats; None where the model does not tell."""
    used: Callable[[], Used]
    """What was asked of it so far."""
