"""How far a model has learned secrets by heart.

Carlini et al. 2019 (arXiv:1802.08232), definition 5: the exposure of a secret is log2 of the number of candidates less
log2 of its rank among them by likelihood. The candidates are drawn at random, as in their section 6.1, the secret being
one of them. A secret that the model never saw has any rank with the same chance: 1.44 bits of exposure on average.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from typing import NamedTuple

from fedllm.audit.bounds import epsilon_from_one_run


def exposure(own: float, others: Sequence[float]) -> float:
    """Return the exposure in bits of a secret with this log-likelihood among others; an equal one stands before it.

    >>> exposure(-1.0, [-2.0, -3.0, -4.0]), exposure(-9.0, [-2.0, -3.0, -4.0])
    (2.0, 0.0)
    """
    rank = 1 + sum(other >= own for other in others)
    return math.log2(len(others) + 1) - math.log2(rank)


def chance(candidates: int) -> float:
    """Return the mean exposure of a secret that was never seen, among so many candidates with itself.

    >>> round(chance(2), 3)
    0.5
    """
    return math.log2(candidates) - math.lgamma(candidates + 1) / math.log(2) / candidates


def candidates(secret: str, count: int, seed: int) -> list[str]:
    """Return so many other secrets of the same form.

    >>> sorted(candidates("3", 9, 0))
    ['0', '1', '2', '4', '5', '6', '7', '8', '9']
    """
    draw, found = random.Random(seed), dict.fromkeys([secret])
    while len(found) < min(count + 1, 10 ** len(secret)):
        found[f"{draw.randrange(10 ** len(secret)):0{len(secret)}}"] = None
    return list(found)[1:]


def standing(own: float, others: Sequence[float]) -> float:
    """Return how far a secret's log-likelihood is above that of the others, in their standard deviations."""
    mean = sum(others) / len(others)
    spread = math.sqrt(sum((other - mean) ** 2 for other in others) / len(others))
    return (own - mean) / max(spread, 1e-12)


class Told(NamedTuple):
    """What the canaries say about epsilon."""

    epsilon: float
    guesses: int
    right: int
    most: float
    """The bound if every guess had been right: more than that so many canaries cannot show."""


def from_coins(standings: Sequence[float], planted: Sequence[bool], delta: float) -> Told:
    """Guess which canaries were planted, and return the lower bound on epsilon that the right guesses give.

    The third that stands highest is taken to be planted and the lowest third not to be; of the rest nothing is said.
    """
    third = len(planted) // 3
    order = sorted(range(len(planted)), key=lambda place: standings[place])
    right = sum(not planted[place] for place in order[:third]) + sum(
        planted[place] for place in order[-third:] * bool(third)
    )
    bound = epsilon_from_one_run(len(planted), 2 * third, right, delta)
    return Told(bound, 2 * third, right, epsilon_from_one_run(len(planted), 2 * third, 2 * third, delta))
