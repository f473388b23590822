"""The weighted mean of updates as a fold: one update's memory, and the same bits in any order of arrival."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.types import Aggregator, Tensors

CHUNK = 1 << 16
"""Values added at a time, so that the temporaries stay in the cache."""


class Total(NamedTuple):
    """A running weighted sum in two float64 words a value (about 106 bits), so that order leaves no trace."""

    high: dict[str, Tensor]
    low: dict[str, Tensor]
    like: Tensors
    weight: Fraction


def add_exactly(high: Tensor, low: Tensor, value: Tensor, weight: float) -> None:
    """Add weight * value to high + low in place; the rounding error of each sum goes to `low`.

    TwoSum of Knuth, The Art of Computer Programming 2, 4.2.2, theorem B. The product is exact in
    float64 for float32 values and weights of up to 29 bits.
    """
    for start in range(0, high.numel(), CHUNK):
        h, e = high[start : start + CHUNK], low[start : start + CHUNK]
        x = value[start : start + CHUNK].to(torch.float64).mul_(weight)
        total = h + x
        kept = total - h
        x.sub_(kept)
        e.add_(x)
        h.sub_(kept.neg_().add_(total))
        e.add_(h)
        h.copy_(total)


def mean(weights: Literal["examples", "uniform"] = "examples") -> Aggregator:
    """Average the updates, weighted by each silo's number of `examples` or all alike (`uniform`).

    McMahan et al. 2017 (arXiv:1602.05629), algorithm 1: the sum over k of n_k / n * update_k.
    """
    if weights not in ("examples", "uniform"):
        raise FedllmError(f"aggregate.weights is '{weights}'; use 'examples' or 'uniform'.")

    def zero(like: Tensors) -> Total:
        def blank() -> dict[str, Tensor]:
            return {name: value.new_zeros(value.numel(), dtype=torch.float64) for name, value in like.items()}

        return Total(blank(), blank(), like, Fraction(0))

    def add(total: Total, update: Tensors, weight: float) -> Total:
        share = 1.0 if weights == "uniform" else weight
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"a weight must be finite and positive, not {share}")
        for name, high in total.high.items():
            add_exactly(high, total.low[name], update[name].flatten(), share)
        return total._replace(weight=total.weight + Fraction(share))

    def done(total: Total) -> dict[str, Tensor]:
        whole = float(total.weight)
        return {
            name: (high + total.low[name]).div_(whole).to(total.like[name].dtype).view(total.like[name].shape)
            for name, high in total.high.items()
        }

    return Aggregator(f"mean by {weights}", zero, add, done)
