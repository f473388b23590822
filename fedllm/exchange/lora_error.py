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

COLUMNS = 16

TOGETHER = 32
"""Rounds of up to so many clients are looked at exactly, their updates held; larger ones through random columns, so
many clients in one pass."""


class Group(NamedTuple):
    """Layers of one shape, worked on as one: a sketch S, the start's A S and B, sums of p [A S, 1] and p D [A S, 1].

    D is what a client sent of B, so that B = start - D is reckoned once, at the end.
    """

    names: list[str]
    sketch_IS: Tensor
    seen_LRS: Tensor
    b_LOR: Tensor
    sum_a_LRN: Tensor
    sum_d_LON: Tensor


class Look(NamedTuple):
    """What was sent, clients not yet in the sums, and the sums once there are too many to hold."""

    start: Tensors
    waiting: list[tuple[Tensors, float]]
    groups: list[Group]
    weight: float


class Factors(NamedTuple):
    """The waiting clients' factors of one layer, side by side, and their shares."""

    a_KRI: Tensor
    b_OKR: Tensor
    share_K: Tensor


def lora_error(weights: str = "examples") -> Probe:
    """Build the probe; `weights` as of the mean it looks at.

    In rounds of more than 32 clients each layer's inputs are multiplied by 16 Gaussian columns S;
    ||M S||^2 is an unbiased estimate of ||M||^2, and the ratio is good to a few per cent.
    """

    def zero(like: Tensors) -> Look:
        return Look(like, [], [], 0.0)

    def add(look: Look, update: Tensors, weight: float) -> Look:
        share = weight if weights == "examples" else 1.0
        look.waiting.append((update, share))
        if len(look.waiting) > TOGETHER:
            look.groups.extend(() if look.groups else grouped(look.start))
            sketch_waiting(look)
        return look._replace(weight=look.weight + share)

    def done(look: Look) -> Scalars:
        if look.groups:
            sketch_waiting(look)
        off, whole = estimated(look) if look.groups else exact(look)
        return {"aggregation_error": (off / whole) ** 0.5 if whole else 0.0}

    def claim(facts: Facts) -> Facts:
        if facts.sees != "each":
            raise FedllmError(
                "The LoRA aggregation error needs each silo's update, and the server sees only sums; drop the probe."
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


def grouped(start: Tensors) -> list[Group]:
    """Gather the layers whose factors have the same shapes."""
    shapes: dict[tuple[torch.Size, torch.Size], list[str]] = {}
    for name in layers(start):
        shapes.setdefault((start[name].shape, start[other(name)].shape), []).append(name)
    groups = []
    for names in shapes.values():
        a_LRI, b_LOR = (torch.stack([start[key] for key in keys]) for keys in (names, map(other, names)))
        inputs, rank = a_LRI.shape[2], a_LRI.shape[1]
        sketch_IS = torch.randn(inputs, COLUMNS, generator=generator(0, "sketch", inputs)).div_(COLUMNS**0.5).to(a_LRI)
        seen_LRS = a_LRI @ sketch_IS
        sums = (seen_LRS.new_zeros(*part.shape[:2], COLUMNS + rank) for part in (seen_LRS, b_LOR))
        groups.append(Group(names, sketch_IS, seen_LRS, b_LOR, *sums))
    return groups


def sketch_waiting(look: Look) -> None:
    """Add the waiting clients to the sums of all groups, and let them go."""
    for group in look.groups:
        for update, share in look.waiting:
            sketch(group, update, share)
    look.waiting.clear()


def sketch(group: Group, update: Tensors, share: float) -> None:
    """Add one client to a group's sums."""
    moved_LRI = torch.stack([update[name] for name in group.names])
    d_LOR = torch.stack([update[other(name)] for name in group.names])
    seen_LRS = (group.seen_LRS - moved_LRI @ group.sketch_IS).mul_(share)
    one_LRR = (share * torch.eye(seen_LRS.shape[1]).to(seen_LRS)).expand(len(seen_LRS), -1, -1)
    # One product gives the sum of p D A S and, beside it, that of p D.
    right_LRN = torch.cat([seen_LRS, one_LRR], 2)
    group.sum_a_LRN.add_(right_LRN)
    group.sum_d_LON.baddbmm_(d_LOR, right_LRN)


def estimated(look: Look) -> tuple[float, float]:
    """Return the same two numbers as `exact`, through the sketch."""
    off, whole = 0.0, 0.0
    for group in look.groups:
        seen_LRS = group.sum_a_LRN[..., :COLUMNS] / look.weight
        sums_LON = (group.b_LOR @ group.sum_a_LRN - group.sum_d_LON) / look.weight
        product_LOS, b_LOR = sums_LON[..., :COLUMNS], sums_LON[..., COLUMNS:]
        off += float((product_LOS - b_LOR @ seen_LRS).square().sum())
        whole += float(product_LOS.square().sum())
    return off, whole
