"""Send only the largest cosine coefficients of an update's chunks and remember the rest for the next round."""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Cut, Tensors, Transform
from fedllm.exchange.error_feedback import Codec, tensorwise


def dct(keep: int = 32, chunk: int = 64, beta: float = 0.999, sign: bool = False) -> Transform:
    """Keep the `keep` largest coefficients of every chunk's orthonormal DCT-II.

    Peng et al., DeMo: Decoupled Momentum Optimization, 2024 (arXiv:2411.19870), algorithm 1: m = beta * m + update;
    send q = the coefficients extracted from m; m = m - q. Matrices are cut into chunks of at most `chunk` x `chunk`,
    vectors into chunks of at most `chunk` values. A coefficient is a number of the update's dtype and its place in
    the chunk as uint8, int16 or int32: with the defaults 32 x 48 / 4096 = 0.375 bits a value, 0.25 with `cast` after.
    `beta` = 1 forgets nothing, 0 remembers nothing. With `sign` the aggregate becomes its sign (DeMo's last line), for
    an optimiser with a learning rate of the size of one parameter's step.
    """
    if keep < 1 or chunk < 1:
        raise FedllmError(f"transforms.dct: keep is {keep} and chunk is {chunk}; both must be at least 1.")
    if not 0 <= beta <= 1:
        raise FedllmError(f"transforms.dct: beta is {beta}; it must be between 0 and 1.")

    def pack(value: Tensor, seed: int) -> dict[str, Tensor]:
        coefficients_NS = forward(chunks(value.to(wide(value)), chunk)).flatten(1)
        size = coefficients_NS.shape[1]
        positions_NK = coefficients_NS.abs().topk(min(keep, size), dim=1).indices.sort(dim=1).values
        values_NK = coefficients_NS.gather(1, positions_NK).to(value.dtype)
        return {"values": values_NK, "positions": positions_NK.to(smallest(size))}

    def unpack(parts: Tensors, like: Tensor) -> Tensor:
        y, x, rows, columns = cuts(like.shape, chunk)
        values_NK = parts["values"].to(wide(like))
        coefficients_NS = values_NK.new_zeros(rows * columns, y * x)
        coefficients_NS = coefficients_NS.scatter(1, parts["positions"].long(), values_NK)
        return whole(backward(coefficients_NS.view(-1, y, x)), like.shape, chunk).to(like.dtype)

    def check(name: str, parts: Tensors, like: Tensor) -> None:
        y, x, _, _ = cuts(like.shape, chunk)
        positions = parts["positions"]
        if positions.numel() and (int(positions.min()) < 0 or int(positions.max()) >= y * x):
            raise Refused(f"'{name}' has a position outside of the {y * x} of a chunk")
        if bool((positions[:, 1:] <= positions[:, :-1]).any()):
            raise Refused(f"'{name}' has positions that do not rise")

    made = tensorwise(Codec(f"DCT {keep} of {chunk}x{chunk}", pack, unpack, check), beta)
    return made._replace(finish=signs) if sign else made


def signs(mean: Tensors, state: Tensors, cut: Cut) -> tuple[Tensors, Tensors]:
    """Return the sign of the aggregate."""
    return {name: value.sign() for name, value in mean.items()}, state


def cuts(shape: torch.Size, chunk: int) -> tuple[int, int, int, int]:
    """Return the sides y and x of a tensor's chunks and how many there are each way; more than two dimensions are two.

    >>> cuts(torch.Size([65, 576]), 64)
    (33, 64, 2, 9)
    """
    lengths = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape.numel())
    # Chunks of like size, so that the last one is not mostly empty.
    y, x = (math.ceil(length / max(1, math.ceil(length / chunk))) or 1 for length in lengths)
    return y, x, math.ceil(lengths[0] / y), math.ceil(lengths[1] / x)


def chunks(value: Tensor, chunk: int) -> Tensor:
    """Return a tensor's chunks as [N, y, x], its right and lower edges filled up with 0."""
    y, x, rows, columns = cuts(value.shape, chunk)
    table = value.reshape(value.shape[0], math.prod(value.shape[1:])) if value.dim() > 1 else value.reshape(1, -1)
    table = torch.nn.functional.pad(table, (0, columns * x - table.shape[1], 0, rows * y - table.shape[0]))
    return table.view(rows, y, columns, x).transpose(1, 2).reshape(-1, y, x)


def whole(chunks_Nyx: Tensor, shape: torch.Size, chunk: int) -> Tensor:
    """Return the tensor of these chunks."""
    y, x, rows, columns = cuts(shape, chunk)
    table = chunks_Nyx.view(rows, columns, y, x).transpose(1, 2).reshape(rows * y, columns * x)
    height, width = (shape[0], math.prod(shape[1:])) if len(shape) > 1 else (1, shape.numel())
    return table[:height, :width].reshape(shape)


def forward(chunks_Nyx: Tensor) -> Tensor:
    """Return the two-dimensional DCT-II of every chunk."""
    y, x = (cosines(side).to(chunks_Nyx) for side in chunks_Nyx.shape[1:])
    return y @ chunks_Nyx @ x.T


def backward(coefficients_Nyx: Tensor) -> Tensor:
    """Return the chunks of these coefficients."""
    y, x = (cosines(side).to(coefficients_Nyx) for side in coefficients_Nyx.shape[1:])
    return y.T @ coefficients_Nyx @ x


@lru_cache(maxsize=256)
def cosines(side: int) -> Tensor:
    """Return the orthonormal DCT-II matrix in float64: C[k, i] = sqrt(2/n) cos(pi (2i + 1) k / 2n), row 0 / sqrt(2)."""
    i, k = torch.arange(side, dtype=torch.float64), torch.arange(side, dtype=torch.float64)[:, None]
    matrix = math.sqrt(2 / side) * torch.cos(math.pi * (2 * i + 1) * k / (2 * side))
    matrix[0] /= math.sqrt(2)
    return matrix


def smallest(size: int) -> torch.dtype:
    """Return the shortest type of the wire for places below `size`."""
    return torch.uint8 if size <= 1 << 8 else torch.int16 if size <= 1 << 15 else torch.int32


def wide(value: Tensor) -> torch.dtype:
    """Return the dtype to compute in."""
    return torch.promote_types(value.dtype, torch.float32)
