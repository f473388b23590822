"""The weighted mean of updates as a fold: one update's memory, and the same bits in any order of arrival."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.tensors import CHUNK, pieces
from fedllm.core.types import Aggregator, Facts, Tensors


class Total(NamedTuple):
    """A running weighted sum in two float64 words a value, so that order leaves no trace.

    That is about 106 bits: enough for float32 updates whose values at one place differ by up to some
    20 orders of magnitude.

    Values lie one after the other in the order of the names of `like`.
    """

    high: Tensor
    low: Tensor
    scratch: Tensor
    like: Tensors
    weight: Fraction


def add_exactly(high: Tensor, low: Tensor, value: Tensor, weight: float, scratch: Tensor) -> None:
    """Add weight * value to high + low in place; the rounding error of each sum goes to `low`.

    `scratch` has three float64 rows for what comes between: fresh memory would cost more than the sums.

    TwoSum of Knuth, The Art of Computer Programming 2, 4.2.2, theorem B. The product is exact in
    float64 for float32 values and weights of up to 29 bits.
    """
    x, total, kept = scratch[:, : value.numel()]
    x.copy_(value).mul_(weight)
    torch.add(high, x, out=total)
    torch.sub(total, high, out=kept)
    x.sub_(kept)
    low.add_(x)
    high.sub_(torch.sub(total, kept, out=kept))
    low.add_(high)
    high.copy_(total)


def mean(weights: Literal["examples", "uniform"] = "examples") -> Aggregator:
    """Average the updates, weighted by each silo's number of `examples` or all alike (`uniform`).

    McMahan et al. 2017 (arXiv:1602.05629), algorithm 1: the sum over k of n_k / n * update_k.
    """
    if weights not in ("examples", "uniform"):
        raise FedllmError(f"aggregate.weights is '{weights}'; use 'examples' or 'uniform'.")

    def zero(like: Tensors) -> Total:
        size = sum(value.numel() for value in like.values())
        home = next(iter(like.values())).device
        high, low = (torch.zeros(size, dtype=torch.float64, device=home) for _ in range(2))
        scratch = torch.empty(3, CHUNK, dtype=torch.float64, device=home)
        return Total(high, low, scratch, like, Fraction(0))

    def add(total: Total, update: Tensors, weight: float) -> Total:
        share = 1.0 if weights == "uniform" else weight
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"a weight must be finite and positive, not {share}")
        start = 0
        for piece in pieces(update[name] for name in total.like):
            end = start + piece.numel()
            add_exactly(total.high[start:end], total.low[start:end], piece, share, total.scratch)
            start = end
        return total._replace(weight=total.weight + Fraction(share))

    def done(total: Total) -> dict[str, Tensor]:
        whole, start, averages = float(total.weight), 0, dict[str, Tensor]()
        for name, value in total.like.items():
            end = start + value.numel()
            flat = (total.high[start:end] + total.low[start:end]).div_(whole)
            averages[name] = flat.to(value.dtype).view(value.shape)
            start = end
        return averages

    def claim(facts: Facts) -> Facts:
        return facts._replace(even=weights == "uniform")

    return Aggregator(f"mean by {weights}", zero, add, done, claim)
