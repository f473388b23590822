"""Updates as whole numbers modulo 2^bits whose sum cannot wrap, rounded by chance so that the mean stays the same."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from fedllm.core.errors import FedllmError
from fedllm.exchange.secure.masks import Numbers, stream, words

PIECE = 1 << 16
"""Values rounded at a time, so that temporaries stay in the cache."""

TAILS = 12.0
"""Standard deviations of the sum's noise for which there is room: beyond lies 4e-33 of it."""


class Grid(NamedTuple):
    """How values become whole numbers."""

    bits: int
    largest: float
    """Of one silo's values: those beyond are brought down to it, and counted."""
    step: float
    """What one is worth."""

    @property
    def kind(self) -> type[np.unsignedinteger]:
        """The numbers' type."""
        return np.uint16 if self.bits == 16 else np.uint32


def grid(bits: int, largest: float, silos: int, deviation: float = 0.0) -> Grid:
    """Return the finest grid on which the sum of so many silos' values, with noise on it, has room.

    Every value is at most `largest` and rounded to at most one step more, so that |sum| <= 2^(bits-1) - 1 whatever the
    values are.

    >>> grid(16, 1.0, 3).step * (2**15 - 1 - 3)
    3.0
    """
    room = 2 ** (bits - 1) - 1 - silos
    if room < 16 * silos:
        raise FedllmError(
            f"The sum of {silos} silos has no room in {bits} bits; set secure.bits = 32, or let fewer silos add up."
        )
    return Grid(bits, largest, (silos * largest + TAILS * deviation) / room)


def rounded(values: NDArray[np.float32], by: Grid, scale: float, key: bytes) -> tuple[Numbers, int]:
    """Return scale * values as whole numbers, up or down by chance, and how many were beyond the largest.

    The chance is 2^-16 coarse, hence a bias of at most 2^-17 of a step.
    """
    numbers, chance, beyond = np.empty(len(values), by.kind), stream(key), 0
    signed = numbers.view(np.int16 if by.bits == 16 else np.int32)
    most = by.largest / by.step
    for start in range(0, len(values), PIECE):
        exact = values[start : start + PIECE].astype(np.float64)
        exact *= scale / by.step
        if exact.size and not max(exact.max(), -exact.min()) <= most:
            if not bool(np.isfinite(exact).all()):
                raise FedllmError("A silo's update is not finite; lower client.learning_rate or clip its gradients.")
            # A float32 clip is off in its last bits: what is so little beyond is not counted.
            beyond += int(np.count_nonzero(np.abs(exact) > most * (1 + 2.0**-10)))
            np.clip(exact, -most, most, out=exact)
        drawn = words(chance, len(exact), np.uint16) * 2.0**-16
        np.floor(np.add(exact, drawn, out=drawn), out=drawn)
        signed[start : start + PIECE] = drawn
    return numbers, beyond


def values_of(numbers: Numbers, by: Grid) -> NDArray[np.float64]:
    """Return a sum of whole numbers as values."""
    signed = numbers.view(np.int16 if by.bits == 16 else np.int32)
    return signed.astype(np.float64) * by.step


def room_for(largest: float, dimension: int, by: Grid) -> float:
    """Return the norm that a change of norm `largest` can have once its values are rounded.

    Each of `dimension` values moves by less than one step: the worst case, which on a fine grid is little more.
    """
    return largest + by.step * math.sqrt(dimension)
