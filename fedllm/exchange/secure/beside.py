"""The numbers beside an update in a secure sum: one for each silo, what it weighs, and its held-out loss."""

from __future__ import annotations

import numpy as np

from fedllm.exchange.looking import BEYOND, COUNT, TOTAL
from fedllm.exchange.secure.masks import Numbers, stream, words

SIZE = 6
"""A one for each silo, its weight, its values beyond the largest; a one for each loss, for each too large, the loss."""

LARGEST_LOSS = 64.0
"""Nats a token that a silo's loss counts at most: who guesses among a million tokens has 14."""


def loss_step(silos: int) -> float:
    """Return what one is worth of a loss, so that the sum of so many silos' has room in 32 bits.

    >>> round(1000 * LARGEST_LOSS / loss_step(1000)) < 2**32 - 1000
    True
    """
    return silos * LARGEST_LOSS / 2**31


def beside(weight: int, beyond: int, loss: float | None, silos: int, key: bytes) -> Numbers:
    """Return what a silo adds beside its update, in a sum of at most so many silos.

    Who has no loss adds in its place any number, drawn by chance: so the sum of the losses tells nothing unless all
    silos in it have one, and never the loss of the only one that has.
    """
    if loss is None:
        return np.array([1, weight, beyond, 0, 0, *words(stream(key), 1, np.uint32)], dtype=np.uint32)
    counted = loss if 0 <= loss <= LARGEST_LOSS else LARGEST_LOSS
    return np.array([1, weight, beyond, 1, counted != loss, round(counted / loss_step(silos))], dtype=np.uint32)


def losses_in(numbers: Numbers, silos: int) -> dict[str, float]:
    """Return what a sum of such numbers tells of the losses: nothing unless every silo in it has one."""
    count, _, _, looked, beyond, total = (int(each) for each in numbers)
    if looked != count:
        return {}
    return {TOTAL: total * loss_step(silos), COUNT: float(looked), BEYOND: float(beyond)}
