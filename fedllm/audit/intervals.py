"""What a number of trials is worth: areas, rates at a low false-positive rate, and their intervals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

CONFIDENCE = 0.95


class Estimate(NamedTuple):
    """A number with its 95 % interval and the trials that stand behind it."""

    value: float
    low: float
    high: float
    n: int


def auc(members: Sequence[float], others: Sequence[float]) -> float:
    """Return the chance that a member's score is above another's, ties counting half.

    >>> auc([3.0, 2.0], [1.0, 2.0])
    0.875
    """
    from scipy.stats import rankdata

    ranks = rankdata([*members, *others])
    least = len(members) * (len(members) + 1) / 2
    return float((ranks[: len(members)].sum() - least) / (len(members) * len(others)))


def auc_estimate(members: Sequence[float], others: Sequence[float], seed: int, times: int = 1000) -> Estimate:
    """Return the AUC with the percentile interval of the bootstrap over members and others apart."""
    import numpy

    draw = numpy.random.default_rng(seed)
    one, two = numpy.asarray(members, dtype=float), numpy.asarray(others, dtype=float)
    drawn = [
        auc(one[draw.integers(len(one), size=len(one))].tolist(), two[draw.integers(len(two), size=len(two))].tolist())
        for _ in range(times)
    ]
    low, high = numpy.quantile(drawn, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(auc(members, others), float(low), float(high), len(members) + len(others))


def mean_estimate(values: Sequence[float], seed: int, times: int = 2000) -> Estimate:
    """Return the mean with the percentile interval of the bootstrap."""
    import numpy

    draw, each = numpy.random.default_rng(seed), numpy.asarray(values, dtype=float)
    means = each[draw.integers(len(each), size=(times, len(each)))].mean(1)
    low, high = numpy.quantile(means, [(1 - CONFIDENCE) / 2, (1 + CONFIDENCE) / 2])
    return Estimate(float(each.mean()), float(low), float(high), len(each))


def clopper_pearson(hits: int, trials: int, confidence: float = CONFIDENCE) -> tuple[float, float]:
    """Return the exact interval of a rate (Clopper and Pearson 1934).

    >>> [round(end, 4) for end in clopper_pearson(0, 10)]
    [0.0, 0.3085]
    """
    from scipy.stats import beta

    tail = (1 - confidence) / 2
    low = float(beta.ppf(tail, hits, trials - hits + 1)) if hits else 0.0
    high = float(beta.ppf(1 - tail, hits + 1, trials - hits)) if hits < trials else 1.0
    return low, high


def share_estimate(hits: int, trials: int) -> Estimate:
    """Return a share of hits with its exact interval."""
    return Estimate(hits / trials, *clopper_pearson(hits, trials), trials)


def tpr_at(members: Sequence[float], others: Sequence[float], fpr: float = 0.01) -> Estimate:
    """Return the share of members above a threshold that at most a share `fpr` of the others is above.

    The interval is that of the share alone: the threshold is taken as given.

    >>> tpr_at([5.0, 1.0, 4.0, 9.0], [0.0, 2.0, 3.0]).value
    0.75
    """
    allowed = int(fpr * len(others) + 1e-9)
    threshold = sorted(others, reverse=True)[allowed]
    return share_estimate(sum(score > threshold for score in members), len(members))
