"""What an attack found, beside what guessing gets."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedllm.audit.intervals import Estimate, mean_estimate


class Finding(NamedTuple):
    """One number of one attack in one case."""

    attack: str
    case: str
    """Who sees what: `one record`, `the sum of 9 silos`..."""
    measure: str
    found: Estimate
    chance: float
    leaks: bool
    """Whether it is above chance beyond the doubt of its interval."""
    share: bool = True
    """Whether it is a share, said in per cent."""

    def told(self) -> dict[str, Any]:
        """Return it as JSON can say it."""
        return {**self._asdict(), "found": self.found._asdict()}


def against(
    attack: str, case: str, measure: str, values: Sequence[float], guesses: Sequence[float], seed: int
) -> Finding:
    """Return a mean over trials, held trial by trial against what guessing got there."""
    difference = mean_estimate([one - two for one, two in zip(values, guesses, strict=True)], seed)
    guessed = sum(guesses) / len(guesses)
    return Finding(attack, case, measure, mean_estimate(values, seed), guessed, difference.low > 0)


def over(attack: str, case: str, measure: str, found: Estimate, chance: float, share: bool = True) -> Finding:
    """Return a number held against what chance gives on average."""
    return Finding(attack, case, measure, found, chance, found.low > chance, share)
