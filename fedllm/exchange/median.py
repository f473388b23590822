"""The coordinate-wise median: fewer than half of the updates cannot move it far, whatever they are."""

from __future__ import annotations

from torch import Tensor

from fedllm.core.types import Aggregator
from fedllm.exchange.robust import by_place


def median() -> Aggregator:
    """Take the median of the updates at every place; of an even number the mean of the two in the middle.

    Yin et al. 2018 (arXiv:1803.01498), definition 1 and algorithm 1, option I.
    """
    return by_place("median", middle)


def middle(values_UP: Tensor) -> Tensor:
    """Return the median over the first dimension.

    >>> import torch
    >>> middle(torch.tensor([[1.0, 9.0], [2.0, -50.0], [4.0, 7.0], [1e9, 8.0]])).tolist()
    [3.0, 7.5]
    """
    count, rising = len(values_UP), values_UP.sort(dim=0).values
    return (rising[(count - 1) // 2] + rising[count // 2]) / 2
