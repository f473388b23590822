"""What the attacks on updates are given, and what they are called."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedllm.core.types import Tensors

ATTACKS = {"rows": "embedding rows", "span": "span check", "descent": "descent"}


class Target(NamedTuple):
    """A text to recover, and the update out of which."""

    text: Sequence[int]
    update: Tensors
    length: int
    """Tokens that the attacker takes to be in the update: of a sum those of all texts in it."""
    scored: Sequence[bool] = ()
    """Which tokens are labels, where the update is of this text alone."""


class Recovered(NamedTuple):
    """A trial as it went: the best attack's tokens or text, for those who may see it."""

    text: Sequence[int]
    named: Sequence[int]
    built: Sequence[int]
