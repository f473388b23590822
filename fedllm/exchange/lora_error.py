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

COLUMNS = 64

TOGETHER = 32
"""Rounds of up to so many clients are looked at exactly; larger ones through random columns, so many at a time."""


class Look(NamedTuple):
    """Clients not yet in the sums, and the running sums of p, p A, p B and p B A S with a sketch S."""

    start: Tensors
    sketch: dict[int, Tensor]
    sums: dict[str, Tensor]
    waiting: list[tuple[Tensors, float]]
    weight: float


class Factors(NamedTuple):
    """The waiting clients' factors of one layer, side by side, and their shares."""

    a_KRI: Tensor
    b_OKR: Tensor
    share_K: Tensor


def lora_error(weights: str = "examples") -> Probe:
    """Build the probe; `weights` as of the mean it looks at.

    In rounds of more than 32 clients each layer's inputs are multiplied by 64 Gaussian columns S;
    ||M S||^2 is an unbiased estimate of ||M||^2, and the ratio is good to a few per cent.
    """

    def zero(like: Tensors) -> Look:
        home = next(iter(like.values())).device
        sketch = {
            size: torch.randn(size, COLUMNS, generator=generator(0, "sketch", size)).div_(COLUMNS**0.5).to(home)
            for size in {like[name].shape[1] for name in layers(like)}
        }
        return Look(like, sketch, {}, [], 0.0)

    def add(look: Look, update: Tensors, weight: float) -> Look:
        if len(look.waiting) == TOGETHER:
            settle(look)
        share = weight if weights == "examples" else 1.0
        look.waiting.append((update, share))
        return look._replace(weight=look.weight + share)

    def done(look: Look) -> Scalars:
        if look.sums:
            if look.waiting:
                settle(look)
            off, whole = estimated(look)
        else:
            off, whole = exact(look)
        return {"aggregation_error": (off / whole) ** 0.5 if whole else 0.0}

    def claim(facts: Facts) -> Facts:
        if facts.sees == "sum":
            raise FedllmError(
                "The LoRA aggregation error needs each silo's update, and the server sees only a sum; drop the probe."
            )
        return facts

    return Probe("LoRA aggregation error", zero, add, done, claim)


def layers(tensors: Tensors) -> list[str]:
    """Return the names of the A factors."""
    return [name for name in tensors if ".lora_A." in name]


def other(name: str) -> str:
    """Return the name of the B factor beside an A factor."""
    return name.replace(".lora_A.", ".lora_B.")


def factors(look: Look, name: str) -> Factors:
    """Return a layer's factors after training: what was sent less the updates."""
    a_KRI = torch.stack([update[name] for update, _ in look.waiting]).neg_().add_(look.start[name])
    # Beside one another, so that flattening the last two dimensions copies nothing.
    b_OKR = (
        torch.stack([update[other(name)] for update, _ in look.waiting], 1)
        .neg_()
        .add_(look.start[other(name)][:, None])
    )
    return Factors(a_KRI, b_OKR, a_KRI.new_tensor([share for _, share in look.waiting]))


def exact(look: Look) -> tuple[float, float]:
    """Return ||sum p B A - mean(B) mean(A)||^2 and ||sum p B A||^2 over all layers, without a dense product.

    With factors side by side a sum of products is L R, and ||L R||^2 is the sum of (L'L) * (R R').
    """
    off, whole = 0.0, 0.0
    for name in layers(look.start):
        each = factors(look, name)
        p_K = each.share_K.double() / look.weight
        a_KRI, b_OKR = each.a_KRI.double(), p_K[:, None] * each.b_OKR.double()
        left = b_OKR.flatten(1)
        right = a_KRI.flatten(0, 1)
        mean_a, mean_b = torch.tensordot(p_K, a_KRI, 1), b_OKR.sum(1)
        whole += squared_norm(left, right)
        off += squared_norm(torch.cat([left, -mean_b], 1), torch.cat([right, mean_a]))
    return max(0.0, off), whole


def squared_norm(left: Tensor, right: Tensor) -> float:
    """Return ||left @ right||^2 from the two small Gram matrices."""
    return float(((left.mT @ left) * (right @ right.mT)).sum())


def settle(look: Look) -> None:
    """Put the waiting clients into the sums."""
    for name in layers(look.start):
        each = factors(look, name)
        weighted_OKR = each.b_OKR.mul_(each.share_K[:, None])
        seen = each.a_KRI.flatten(0, 1) @ look.sketch[each.a_KRI.shape[2]]
        grow(look.sums, name, torch.tensordot(each.share_K, each.a_KRI, 1))
        grow(look.sums, other(name), weighted_OKR.sum(1))
        grow(look.sums, f"{name}:product", weighted_OKR.flatten(1) @ seen)
    look.waiting.clear()


def estimated(look: Look) -> tuple[float, float]:
    """Return the same two numbers as `exact`, through the sketch."""
    off, whole = 0.0, 0.0
    for name in layers(look.start):
        a, b, product = (look.sums[key] / look.weight for key in (name, other(name), f"{name}:product"))
        off += float((product - b @ (a @ look.sketch[a.shape[1]])).square().sum())
        whole += float(product.square().sum())
    return off, whole


def grow(sums: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add to a running sum, starting it if it is not there."""
    sums[name] = sums[name].add_(value) if name in sums else value
