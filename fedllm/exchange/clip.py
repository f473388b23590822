"""Bound the norm of an update, at the silo and again at the server, which trusts no silo."""

from __future__ import annotations

from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.tensors import norm
from fedllm.core.types import Facts, Tensors, Transform


def clip(max_norm: float) -> Transform:
    """Scale an update whose L2 norm over all its tensors is above `max_norm` down to it.

    McMahan et al., Learning Differentially Private Recurrent Language Models, 2018
    (arXiv:1710.06963), flat clipping: update * min(1, S / ||update||).
    """
    if max_norm <= 0:
        raise FedllmError(f"transforms.clip: max_norm is {max_norm}; it must be above 0.")

    def clipped(update: Tensors) -> dict[str, Tensor]:
        floats = {name: value for name, value in update.items() if value.is_floating_point()}
        scale = (max_norm / norm(floats).clamp(min=1e-30)).clamp(max=1.0)
        return {**update, **{name: (value * scale).to(value.dtype) for name, value in floats.items()}}

    def claim(facts: Facts) -> Facts:
        return facts._replace(norm_bound=min(max_norm, facts.norm_bound or max_norm))

    return Transform(
        "clip",
        lambda update, memory, seed: (clipped(update), {}),
        lambda wire, like: clipped(wire),
        claim=claim,
        decoded=claim,
        # A mean of updates within the bound is within it: there is nothing left to clip, unless a silo cheats.
        summable=True,
    )
