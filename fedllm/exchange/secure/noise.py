"""Noise on whole numbers: the discrete Gaussian, of which every silo adds a part.

Kairouz, Liu and Steinke 2021 (arXiv:2102.06387), the distributed discrete Gaussian: the sum of n of them is so close to
one with n times the variance (theorem 11: a factor exp(-pi^2 sigma^2) off, and sigma is above 2^7 here) that it hides
as much as a continuous Gaussian does.

It differs from the paper: no random rotation, since 32 bits have room without one, and instead of conditional rounding
the noise is made larger by the worst case of rounding.
"""

from __future__ import annotations

import numpy as np
from cryptography.hazmat.primitives.ciphers import CipherContext
from numpy.typing import NDArray

from fedllm.core.errors import FedllmError
from fedllm.exchange.secure.masks import stream, words

PIECE = 1 << 16

LEAST = 2.0**7
"""Standard deviation of one silo's part, in steps, below which the sum of such parts is not accounted for here."""


def discrete_gaussian(key: bytes, count: int, deviation: float) -> NDArray[np.int64]:
    """Return `count` draws from the discrete Gaussian of this standard deviation (before it is made discrete).

    Canonne, Kamath and Steinke 2020 (arXiv:2004.00010), algorithm 3, in float64 from 53 bits a uniform: probabilities
    are right to about 1e-15 of themselves.
    """
    if not deviation >= LEAST:
        raise FedllmError(
            f"One silo's part of the noise would be {deviation:.3g} steps of the grid, and {LEAST:g} are needed; set "
            "secure.bits = 32, add more noise, or bound the updates lower."
        )
    cipher, drawn = stream(key), np.empty(count, np.int64)
    done = 0
    while done < count:
        some = candidates(cipher, min(PIECE, 2 * (count - done) + 64), deviation)[: count - done]
        drawn[done : done + len(some)] = some
        done += len(some)
    return drawn


def candidates(cipher: CipherContext, count: int, deviation: float) -> NDArray[np.int64]:
    """Draw so many discrete Laplace variables and return those that are accepted: about three in four."""
    scale = np.floor(deviation) + 1
    size = np.floor(-scale * np.log(uniform(cipher, count)))
    negative = words(cipher, count, np.uint8) & 1 == 1
    chance = np.exp(-((size - deviation**2 / scale) ** 2) / (2 * deviation**2))
    # There is one 0, not one of either sign.
    kept = (uniform(cipher, count) <= chance) & ~(negative & (size == 0))
    found: NDArray[np.int64] = np.where(negative, -size, size)[kept].astype(np.int64)
    return found


def uniform(cipher: CipherContext, count: int) -> NDArray[np.float64]:
    """Return numbers above 0 up to 1, of 53 bits."""
    high = (words(cipher, count, np.uint64) >> np.uint64(11)) + np.uint64(1)
    return high.astype(np.float64) * 2.0**-53
