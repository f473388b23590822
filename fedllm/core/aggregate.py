"""The weighted mean of updates as a fold: a few MB beside the sums, and the same bits in any order of arrival."""

from __future__ import annotations

import math
from fractions import Fraction
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.tensors import pieces, whole_again
from fedllm.core.types import Aggregator, Aside, Facts, Tensors

HELD = 8 << 20
"""Bytes of updates that wait to be added in one pass over the sums, which training has driven out of the cache."""


class Total(NamedTuple):
    """A running weighted sum in two float64 words a value, so that order leaves no trace.

    That is about 106 bits: enough for float32 updates whose values at one place differ by up to some
    20 orders of magnitude.

    Values lie in pieces, in the order of the names of `like`; `spare` has a row for each size of piece. The sums lack
    the updates that are `waiting`.
    """

    high: list[Tensor]
    low: list[Tensor]
    spare: dict[int, Tensor]
    scratch: Tensor
    like: Tensors
    weight: Fraction
    waiting: list[tuple[Tensors, float]]


def add_exactly(high: Tensor, low: Tensor, value: Tensor, weight: float, spare: Tensor, scratch: Tensor) -> None:
    """Add weight * value to high + low: the sum, rounded, goes to `spare`, and the rounding error to `low`.

    `high` and the two float64 rows of `scratch` are overwritten: fresh memory, or a copy of the sum
    to where it was, would cost as much as a sum.

    TwoSum of Knuth, The Art of Computer Programming 2, 4.2.2, theorem B. The product is exact in
    float64 for float32 values and weights of up to 29 bits.
    """
    x, kept = scratch[:, : value.numel()]
    x.copy_(value)
    torch.add(high, x, alpha=weight, out=spare)
    torch.sub(spare, high, out=kept)
    torch.sub(kept, x, alpha=weight, out=x)
    torch.sub(spare, kept, out=kept)
    low.add_(high.sub_(kept).sub_(x))


def add_waiting(total: Total) -> None:
    """Add the updates that wait to the sums, and let them go."""
    high, low, spare = total.high, total.low, total.spare
    cut = zip(*(pieces(map(update.__getitem__, total.like)) for update, _ in total.waiting), strict=True)
    for place, row in enumerate(cut):
        for piece, (_, share) in zip(row, total.waiting, strict=True):
            size = piece.numel()
            add_exactly(high[place], low[place], piece, share, spare[size], total.scratch)
            high[place], spare[size] = spare[size], high[place]
    total.waiting.clear()


def mean(weights: Literal["examples", "uniform"] = "examples") -> Aggregator:
    """Average the updates, weighted by each silo's number of `examples` or all alike (`uniform`).

    McMahan et al. 2017 (arXiv:1602.05629), algorithm 1: the sum over k of n_k / n * update_k.
    """
    if weights not in ("examples", "uniform"):
        raise FedllmError(f"aggregate.weights is '{weights}'; use 'examples' or 'uniform'.")

    def zero(like: Tensors) -> Total:
        shapes = [torch.zeros_like(piece, dtype=torch.float64) for piece in pieces(like.values())]
        spare = {piece.numel(): torch.empty_like(piece) for piece in shapes}
        scratch = torch.empty(2, max(spare), dtype=torch.float64, device=shapes[0].device)
        return Total(shapes, [piece.clone() for piece in shapes], spare, scratch, like, Fraction(0), [])

    def add(total: Total, update: Tensors, weight: float) -> Total:
        share = 1.0 if weights == "uniform" else weight
        if not (math.isfinite(share) and share > 0):
            raise ValueError(f"a weight must be finite and positive, not {share}")
        total.waiting.append((update, share))
        # What lies outside of memory would wait in it.
        if isinstance(update, Aside) or sum(value.nbytes for value in update.values()) * len(total.waiting) >= HELD:
            add_waiting(total)
        return total._replace(weight=total.weight + Fraction(share))

    def done(total: Total) -> dict[str, Tensor]:
        add_waiting(total)
        whole = float(total.weight)
        averages = (high.add(low).div_(whole) for high, low in zip(total.high, total.low, strict=True))
        return whole_again(averages, total.like)

    def again(total: Total) -> Total:
        for word in (*total.high, *total.low):
            word.zero_()
        return total._replace(weight=Fraction(0), waiting=[])

    def claim(facts: Facts) -> Facts:
        if facts.sees == "groups":
            raise FedllmError(
                "aggregate.name is 'mean', which needs no more than one sum of all silos, and secure.groups shows the "
                "server several; set secure.groups = 1, or compare the groups by aggregate.name = 'median'."
            )
        return facts._replace(even=weights == "uniform")

    return Aggregator(f"mean by {weights}", zero, add, done, claim, again)
