"""Send only the largest values of an update and remember the rest for the next round."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Tensors, Transform


def top_k(fraction: float, error_feedback: bool = True) -> Transform:
    """Keep the `fraction` of each tensor's values that are largest in magnitude.

    Stich et al., Sparsified SGD with Memory, 2018 (arXiv:1809.07599), algorithm 1: send
    g = top_k(m + update), keep m = m + update - g. On the wire a tensor is its values and their
    int32 positions.
    """
    if not 0 < fraction <= 1:
        raise FedllmError(f"transforms.top_k: fraction is {fraction}; it must be above 0 and at most 1.")

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wire, kept = {}, {}
        for name, value in update.items():
            if not value.is_floating_point():
                wire[name] = value
                continue
            whole = (value + memory[name] if name in memory else value).flatten()
            count = max(1, round(fraction * whole.numel()))
            positions = whole.abs().topk(count).indices.sort().values
            wire[f"{name}:values"] = whole[positions]
            wire[f"{name}:positions"] = positions.to(torch.int32)
            if error_feedback:
                kept[name] = whole.index_fill(0, positions, 0.0).view(value.shape)
        return wire, kept

    def decode(wire: Tensors, like: Tensors) -> dict[str, Tensor]:
        update = {}
        for name, shape in like.items():
            if not shape.is_floating_point():
                update[name] = wire[name]
                continue
            values, positions = wire[f"{name}:values"], wire[f"{name}:positions"].long()
            if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= shape.numel()):
                raise Refused(f"'{name}' has a position outside of its {shape.numel()} values")
            if bool((positions[1:] <= positions[:-1]).any()):
                raise Refused(f"'{name}' has positions that do not rise")
            whole = values.new_zeros(shape.numel(), dtype=shape.dtype)
            update[name] = whole.index_put((positions,), values.to(shape.dtype)).view(shape.shape)
        return update

    return Transform(f"top {fraction:g}", encode, decode)
