"""How far the average of LoRA's factors is from the average of their products.

Averaging A and B apart is not averaging B A (Sun et al. 2024, arXiv:2403.12313, section 2); the probe
reports ||sum p B A - mean(B) mean(A)|| / ||sum p B A||, Frobenius over all layers together.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.core.types import Facts, Probe, Scalars, Tensors

EXACT = 1024
"""Layers with more inputs than this are seen through random columns, so that no dense product is held."""

COLUMNS = 64


class Look(NamedTuple):
    """Running sums of p, p A, p B and p B (A S), where S is the identity or a sketch."""

    start: Tensors
    sketch: dict[int, Tensor]
    factors: dict[str, Tensor]
    products: dict[str, Tensor]
    weight: float


def lora_error(weights: str = "examples") -> Probe:
    """Build the probe; `weights` as of the mean it looks at.

    Layers of more than 1,024 inputs are multiplied by 64 Gaussian columns, whose Frobenius norm is
    an unbiased estimate; there the ratio is good to a few per cent.
    """

    def zero(like: Tensors) -> Look:
        layers = [name for name in like if ".lora_A." in name]
        inputs = {like[name].shape[1] for name in layers}
        sketch = {
            size: torch.randn(size, COLUMNS, generator=generator(0, "sketch", size)).div_(COLUMNS**0.5)
            for size in inputs
            if size > EXACT
        }
        return Look(like, {k: v.to(like[layers[0]].device) for k, v in sketch.items()}, {}, {}, 0.0)

    def add(look: Look, update: Tensors, weight: float) -> Look:
        share = weight if weights == "examples" else 1.0
        for name in update:
            if ".lora_A." not in name:
                continue
            other = name.replace(".lora_A.", ".lora_B.")
            a, b = look.start[name] - update[name], look.start[other] - update[other]
            grow(look.factors, name, share * a)
            grow(look.factors, other, share * b)
            grow(look.products, name, share * (b @ seen(look, a)))
        return look._replace(weight=look.weight + share)

    def done(look: Look) -> Scalars:
        off, whole = 0.0, 0.0
        for name, product in look.products.items():
            a = look.factors[name] / look.weight
            b = look.factors[name.replace(".lora_A.", ".lora_B.")] / look.weight
            mean = product / look.weight
            off += float((mean - b @ seen(look, a)).double().square().sum())
            whole += float(mean.double().square().sum())
        return {"aggregation_error": (off / whole) ** 0.5 if whole else 0.0}

    def claim(facts: Facts) -> Facts:
        if facts.sees == "sum":
            raise FedllmError(
                "The LoRA aggregation error needs each silo's update, and the server sees only a sum; drop the probe."
            )
        return facts

    return Probe("LoRA aggregation error", zero, add, done, claim)


def seen(look: Look, a: Tensor) -> Tensor:
    """Return A, or A through the sketch of its number of inputs."""
    sketch = look.sketch.get(a.shape[1])
    return a if sketch is None else a @ sketch


def grow(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a running sum, starting it if it is not there."""
    sums[name] = sums[name].add_(value) if name in sums else value
