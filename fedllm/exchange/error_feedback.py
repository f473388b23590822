"""Codecs that take one float tensor at a time, and remember at the silo what they did not send."""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.core.tensors import require_like
from fedllm.core.types import Facts, Tensors, Transform, unchanged

PARTS = {"values", "positions", "codes", "scales"}
"""What a codec can make of a tensor `x`: it travels as `x:values` and so on."""


class Codec(NamedTuple):
    """A float tensor as parts that travel, and back; `pack` and `unpack` also run on meta tensors."""

    name: str
    pack: Callable[[Tensor, int], dict[str, Tensor]]
    """From a tensor and a seed to its parts, by their names in `PARTS`."""
    unpack: Callable[[Tensors, Tensor], Tensor]
    """From the parts and a tensor of the shape and dtype that must come back to that tensor."""
    check: Callable[[str, Tensors, Tensor], None]
    """Raises `Refused` for parts of that name which `pack` cannot have made; their shapes and dtypes are seen to."""


def tensorwise(codec: Codec, feedback: float) -> Transform:
    """Send every float tensor through a codec; what `feedback` > 0 keeps at the silo is added to the next update.

    With C for the codec and back: send C(feedback * m + update), keep m = feedback * m + update - C(...).
    At 1 this is error feedback, in which nothing is lost: Seide et al. 2014 (1-bit SGD, section 2) and
    Karimireddy et al. 2019 (arXiv:1901.09847), algorithm 2; below 1 the memory fades. Tensors that a
    round does not update keep theirs.
    """

    @lru_cache(maxsize=4096)
    def layout(shape: torch.Size, dtype: torch.dtype) -> dict[str, Tensor]:
        return codec.pack(torch.empty(shape, dtype=dtype, device="meta"), 0)

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        wire, kept = dict[str, Tensor](), dict(memory)
        for name, value in update.items():
            if not value.is_floating_point():
                wire[name] = value
                continue
            if feedback and name.rpartition(":")[2] in PARTS:
                raise FedllmError(
                    f"transforms: '{codec.name}' keeps what it did not send for the next round, but an earlier "
                    f"transform sends other values as '{name}' in each; put it first, or let it keep nothing "
                    "(error_feedback = false, or beta = 0)."
                )
            whole = torch.add(value, memory[name].to(value), alpha=feedback) if name in memory else value
            parts = codec.pack(whole, derive(seed, name))
            wire |= {f"{name}:{part}": sent for part, sent in parts.items()}
            if feedback:
                # The server refuses what is not finite, and no later round shall suffer from it.
                kept[name] = torch.nan_to_num_(whole - codec.unpack(parts, whole), 0.0, 0.0, 0.0)
        return wire, kept if feedback else {}

    def decode(wire: Tensors, like: Tensors) -> dict[str, Tensor]:
        floats = {name: value for name, value in like.items() if value.is_floating_point()}
        parts = {name: layout(value.shape, value.dtype) for name, value in floats.items()}
        expected = {f"{name}:{part}": value for name, each in parts.items() for part, value in each.items()}
        require_like(wire, {**{name: value for name, value in like.items() if name not in floats}, **expected})
        update = {}
        for name, value in like.items():
            if name not in floats:
                update[name] = wire[name]
                continue
            own = {part: wire[f"{name}:{part}"] for part in parts[name]}
            codec.check(name, own, value)
            update[name] = codec.unpack(own, value)
        require_like(update, like)
        return update

    return Transform(codec.name, encode, decode, claim=unbounded if feedback else unchanged, apart=True)


def unbounded(facts: Facts) -> Facts:
    """Say that no bound of the update's norm is known any more."""
    return facts._replace(norm_bound=None)
