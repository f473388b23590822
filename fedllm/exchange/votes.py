"""Votes of silos: the plain count, or report-noisy-max, of which the winner alone is released.

Report noisy max (Dwork and Roth 2014, The Algorithmic Foundations of Differential Privacy, Claim 3.9): Laplace noise of
scale 1/epsilon on every count, and the place of the largest, is epsilon-differentially private when one participant
changes every count by at most 1 and all in one direction. Here a participant is a silo, which has one vote. The
candidates must be known beforehand: a candidate that is there only because a silo named it tells of that silo.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from fedllm.core.errors import FedllmError


def winner(counts: Sequence[float], epsilon: float | None = None, generator: torch.Generator | None = None) -> int:
    """Return the place of the candidate with the most votes, the first of equals; with `epsilon` by report noisy max.

    >>> winner([1, 3, 3])
    1
    """
    if not counts:
        raise FedllmError("There is nothing to vote on; give at least one candidate.")
    values = torch.tensor(counts, dtype=torch.float64)
    if epsilon is not None:
        values = values + laplace(len(counts), 1 / epsilon, generator)
    return int(values.argmax())


def laplace(count: int, scale: float, generator: torch.Generator | None = None) -> torch.Tensor:
    """Return so many draws from the Laplace distribution around 0, as the difference of two exponential ones."""
    uniform = torch.rand(2, count, dtype=torch.float64, generator=generator)
    # A draw of 0 has no logarithm; 1 - u is never 0, since u is below 1.
    first, second = -torch.log1p(-uniform)
    return scale * (first - second)


def epsilon_of_votes(votes: int, epsilon: float, delta: float = 0.0) -> float:
    """Return what `votes` noisy votes of `epsilon` each spend together, for one silo that takes part in all of them.

    The better of plain composition, k * epsilon, and, with a `delta`, composition by zero-concentrated differential
    privacy (Bun and Steinke 2016, Propositions 1.4 and 1.3): rho = k * epsilon^2 / 2 and rho + 2 sqrt(rho ln(1/delta)).

    >>> epsilon_of_votes(4, 0.5), round(epsilon_of_votes(400, 0.05, 1e-5), 3)
    (2.0, 5.299)
    """
    plain = votes * epsilon
    if not 0 < delta < 1:
        return plain
    rho = votes * epsilon**2 / 2
    return min(plain, rho + 2 * math.sqrt(rho * math.log(1 / delta)))


def require_epsilon(epsilon: float | None) -> None:
    """Refuse an epsilon that promises nothing or is none."""
    if epsilon is not None and not 0 < epsilon < math.inf:
        raise FedllmError(f"algorithm.epsilon is {epsilon}; give a number above 0, or leave it out for plain votes.")
