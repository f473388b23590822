"""Send only the largest values of an update and remember the rest for the next round."""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Tensors, Transform
from fedllm.exchange.error_feedback import Codec, tensorwise


def top_k(fraction: float, error_feedback: bool = True) -> Transform:
    """Keep the `fraction` of each tensor's values that are largest in magnitude.

    Stich et al., Sparsified SGD with Memory, 2018 (arXiv:1809.07599), algorithm 1: send
    g = top_k(m + update), keep m = m + update - g. On the wire a tensor is its values and their
    int32 positions.
    """
    if not 0 < fraction <= 1:
        raise FedllmError(f"transforms.top_k: fraction is {fraction}; it must be above 0 and at most 1.")

    def pack(value: Tensor, seed: int) -> dict[str, Tensor]:
        whole = value.flatten()
        count = max(1, round(fraction * whole.numel()))
        positions = whole.abs().topk(count).indices.sort().values
        return {"values": whole[positions], "positions": positions.to(torch.int32)}

    return tensorwise(Codec(f"top {fraction:g}", pack, unpack, check), float(error_feedback))


def unpack(parts: Tensors, like: Tensor) -> Tensor:
    """Return the tensor with the values in their places and 0 elsewhere."""
    values = parts["values"].to(like.dtype)
    whole = values.new_zeros(like.numel())
    return whole.index_put((parts["positions"].long(),), values).view(like.shape)


def check(name: str, parts: Tensors, like: Tensor) -> None:
    """Refuse positions that are none, or that one could not tell apart from others."""
    positions = parts["positions"]
    if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= like.numel()):
        raise Refused(f"'{name}' has a position outside of its {like.numel()} values")
    if bool((positions[1:] <= positions[:-1]).any()):
        raise Refused(f"'{name}' has positions that do not rise")
