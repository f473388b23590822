"""A lower bound on epsilon from an attack: what noise that were as strong as claimed could not have let happen."""

from __future__ import annotations

import math


def epsilon_from_one_run(planted: int, guesses: int, right: int, delta: float, confidence: float = 0.95) -> float:
    """Return the lower bound on epsilon from one run in which each of `planted` canaries was in by a coin's toss.

    Steinke, Nasr and Jagielski 2023 (arXiv:2305.08846), theorem 5.2 and appendix D: of `guesses` made (the others are
    passed over, by a rule fixed before) `right` were right; under (epsilon, delta) that many are as unlikely as so many
    successes of a coin with e^epsilon / (1 + e^epsilon), up to a term in delta.
    """
    unlikely, low, high = 1 - confidence, 0.0, 1.0
    while chance_of(planted, guesses, right, high, delta) < unlikely:
        high += 1.0
    if chance_of(planted, guesses, right, 0.0, delta) >= unlikely:
        return 0.0
    for _ in range(40):
        middle = (low + high) / 2
        if chance_of(planted, guesses, right, middle, delta) < unlikely:
            low = middle
        else:
            high = middle
    return low


def chance_of(planted: int, guesses: int, right: int, epsilon: float, delta: float) -> float:
    """Return the most that the chance of `right` right guesses can be under (epsilon, delta)."""
    import numpy
    from scipy.stats import binom

    rate = 1 / (1 + math.exp(-epsilon))
    whole = float(binom.sf(right - 1, guesses, rate))
    if not delta or not right:
        return min(1.0, whole)
    less = numpy.arange(1, right + 1)
    steepest = float((numpy.cumsum(binom.pmf(right - less, guesses, rate)) / less).max())
    return min(1.0, whole + 2 * planted * delta * steepest)
