"""The coordinate-wise trimmed mean: the largest and the smallest values at every place do not count."""

from __future__ import annotations

import math

from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.types import Aggregator
from fedllm.exchange.robust import by_place


def trimmed_mean(fraction: float = 0.2) -> Aggregator:
    """Average what is left at every place without the largest and the smallest `fraction` of the updates' values.

    Yin et al. 2018 (arXiv:1803.01498), definition 2 and algorithm 1, option II. The number at either end is rounded up,
    so that one update at least is left out, and the one or two in the middle always stay.
    """
    if not 0 < fraction < 0.5:
        raise FedllmError(f"aggregate.fraction is {fraction}; it must be above 0 and below 0.5.")
    return by_place("trimmed_mean", lambda values: inner_mean(values, fraction))


def inner_mean(values_UP: Tensor, fraction: float) -> Tensor:
    """Return the mean over the first dimension without the ends.

    >>> import torch
    >>> inner_mean(torch.tensor([[1.0], [2.0], [6.0], [1e9], [-1e9]]), 0.2).tolist()
    [3.0]
    """
    count = len(values_UP)
    ends = min(math.ceil(fraction * count), (count - 1) // 2)
    return values_UP.sort(dim=0).values[ends : count - ends].mean(dim=0)
