"""Send an update in a shorter float."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from fedllm.core.types import Tensors, Transform


def cast(dtype: Literal["bfloat16", "float16"] = "bfloat16") -> Transform:
    """Round every float tensor to `dtype` for the wire; half the bytes of float32."""
    short = getattr(torch, dtype)

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[dict[str, Tensor], Tensors]:
        return {n: v.to(short) if v.is_floating_point() else v for n, v in update.items()}, {}

    def decode(wire: Tensors, like: Tensors) -> dict[str, Tensor]:
        return {name: value.to(like[name].dtype) for name, value in wire.items()}

    return Transform(f"cast to {dtype}", encode, decode, apart=True, by_value=True)
