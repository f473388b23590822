"""Send an update as whole numbers of 8 or 4 bits, with one scale for every block of values."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.seeds import generator
from fedllm.core.types import Tensors, Transform
from fedllm.exchange.error_feedback import Codec, tensorwise, unbounded

TINY = torch.finfo(torch.float32).tiny


def quantise(
    bits: Literal[4, 8] = 8,
    block: int = 64,
    error_feedback: bool = True,
    stochastic: bool = False,
) -> Transform:
    """Round every block of `block` neighbouring values to whole multiples of its largest magnitude / (2^(bits-1) - 1).

    A value takes `bits` + 16 / `block` bits on the wire (8.25 and 4.25 by default): int8, or two to a
    byte, and a bfloat16 scale a block. What the rounding took away is kept at the silo and added in
    the next round (`error_feedback`). `stochastic` rounds up or down by chance, so that the mean over
    chance is the value itself (QSGD: Alistarh et al. 2017, arXiv:1610.02132, section 3.1).
    """
    if block < 1:
        raise FedllmError(f"transforms.quantise: block is {block}; it must be at least 1.")
    largest = 2 ** (bits - 1) - 1

    def pack(value: Tensor, seed: int) -> dict[str, Tensor]:
        blocks = in_blocks(value.float(), block)
        scales = rounded_up(blocks.abs().amax(1) / largest)
        # Of a block that is 0, or so small that its scale has no inverse, nothing is sent.
        inverse = torch.where(scales > TINY, 1 / scales.float(), 0.0)
        steps = (blocks * inverse[:, None]).flatten()[: value.numel()]
        codes = (steps + chance(steps, seed)).floor() if stochastic else steps.round()
        codes = codes.clamp(-largest, largest).to(torch.int8)
        return {"codes": codes if bits == 8 else two_a_byte(codes), "scales": scales}

    def unpack(parts: Tensors, like: Tensor) -> Tensor:
        codes = parts["codes"] if bits == 8 else one_a_byte(parts["codes"])[: like.numel()]
        blocks = in_blocks(codes.float(), block) * parts["scales"].float()[:, None]
        return blocks.flatten()[: like.numel()].view(like.shape).to(like.dtype)

    def check(name: str, parts: Tensors, like: Tensor) -> None:
        codes = parts["codes"] if bits == 8 else one_a_byte(parts["codes"])
        if codes.numel() and int(codes.min()) < -largest:
            raise Refused(f"'{name}' has a code below {-largest}")

    made = tensorwise(Codec(f"int{bits}", pack, unpack, check), float(error_feedback))
    # Rounding may lengthen an update at the silo, and a silo may send any codes and scales.
    return made._replace(claim=unbounded, decoded=unbounded)


def in_blocks(value: Tensor, block: int) -> Tensor:
    """Return the values in rows of `block`, the last one filled up with 0."""
    rows = math.ceil(value.numel() / block)
    filled = torch.nn.functional.pad(value.flatten(), (0, rows * block - value.numel()))
    return filled.view(rows, block)


def rounded_up(scales: Tensor) -> Tensor:
    """Return scales as bfloat16, never less than they were, so that no value is beyond the largest code."""
    short = scales.to(torch.bfloat16)
    return torch.where(short.float() < scales, torch.nextafter(short, torch.full_like(short, math.inf)), short)


def chance(like: Tensor, seed: int) -> Tensor:
    """Return numbers from 0 to 1, the same on every device."""
    if like.is_meta:
        return like
    return torch.rand(like.shape, generator=generator(seed, "quantise")).to(like.device)


def two_a_byte(codes: Tensor) -> Tensor:
    """Return codes from -8 to 7 as bytes, the first of two in the lower half; an odd last one is alone."""
    halves = torch.nn.functional.pad(codes, (0, codes.numel() % 2)).view(torch.uint8) & 15
    return halves[0::2] | halves[1::2] << 4


def one_a_byte(codes: Tensor) -> Tensor:
    """Return the codes of `two_a_byte`, in pairs."""
    halves = torch.stack([codes & 15, codes >> 4], 1).flatten()
    return (halves ^ 8).to(torch.int8) - 8
