"""Noise that protects: drawn from a secret of the node that adds it, the same again for the same question.

Uniform bits are those of SHAKE-256 over a 32-byte key, which is cryptographic: who does not have the secret cannot
tell them from chance. The key is bound to what the noise is added to, so that work which is repeated after a kill says
the same again and tells no more, while another sum in the same round gets noise of its own.

Gaussians come from them by Box and Muller's transform in float64, from 53 bits each: the tails end at 8.57 standard
deviations, beyond which an ideal one has 1e-17 of its mass. Adding floats gives noise away in its lowest bits (Mironov
2012), so value and noise are both rounded to multiples of one power of two before they are added, and their sum is
exact: the result is an ideal mechanism's, rounded, up to the error of the transform within one cell of that grid.
"""

from __future__ import annotations

import hashlib
import math
import secrets
from collections.abc import Iterator

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.types import Tensors

SECRET_BYTES = 32
GRID = 30
"""The grid is 2^-30 of the noise's standard deviation, rounded down to a power of two."""
BLOCK = 1 << 16
"""Normals drawn at a time: always the same, since their last bits may depend on it."""


def fresh_secret() -> bytes:
    """Return 32 bytes from the operating system's generator."""
    return secrets.token_bytes(SECRET_BYTES)


def key_of(secret: bytes, *address: str | int | bytes) -> bytes:
    """Return the key at an address below a secret; without the secret nothing can be said of it.

    >>> key_of(b"s" * 32, "a", 1) == key_of(b"s" * 32, "a", 1) != key_of(b"s" * 32, "a", 2)
    True
    """
    if len(secret) != SECRET_BYTES:
        raise ValueError(f"a secret has {SECRET_BYTES} bytes, not {len(secret)}")
    hashed = hashlib.blake2b(key=secret, digest_size=SECRET_BYTES)
    for part in address:
        text = part if isinstance(part, bytes) else repr(part).encode()
        hashed.update(len(text).to_bytes(8, "little") + text)
    return hashed.digest()


def digest(tensors: Tensors) -> bytes:
    """Return a hash of the names and numbers of tensors."""
    hashed = hashlib.blake2b(digest_size=32)
    for name, value in tensors.items():
        hashed.update(f"{name}\x1f{value.dtype}\x1f{tuple(value.shape)}\x1e".encode())
        flat = value.detach().cpu().contiguous().flatten()
        hashed.update(flat.view(torch.uint8).numpy().data if flat.numel() else b"")
    return hashed.digest()


def words(key: bytes, count: int) -> Tensor:
    """Return `count` whole numbers from 0 to 2^53 - 1, as float64."""
    bits = torch.frombuffer(bytearray(hashlib.shake_256(key).digest(8 * count)), dtype=torch.int64)
    return bits.bitwise_and_((1 << 53) - 1).double()


def uniform(key: bytes, count: int) -> Tensor:
    """Return `count` numbers from 0 up to, not including, 1, as float64."""
    return words(key, count).mul_(2.0**-53) if count else torch.zeros(0, dtype=torch.float64)


def normals(key: bytes, count: int) -> Iterator[Tensor]:
    """Yield `count` standard normals, as float64, in pieces."""
    for place in range(0, count, BLOCK):
        half = BLOCK // 2
        drawn = words(key_of(key, "normals", place), BLOCK)
        radius = drawn[:half].add_(1.0).mul_(2.0**-53).log_().mul_(-2.0).sqrt_()
        angle = drawn[half:].mul_(2 * math.pi * 2.0**-53)
        yield torch.cat([radius * angle.cos(), radius * angle.sin()])[: count - place]


def grid_of(deviation: float) -> float:
    """Return the step of the grid for noise of this standard deviation.

    >>> grid_of(1.0) == grid_of(1.9) == 2.0**-30
    True
    """
    return 2.0 ** (math.floor(math.log2(deviation)) - GRID)


def with_noise(values: Tensors, deviation: float, key: bytes) -> dict[str, Tensor]:
    """Return float32 tensors with N(0, deviation^2) added to every value, on a grid.

    A value moves by half a step of the grid at most, so two sets of values that are S apart are at most
    S + step * sqrt(number of values) apart on the grid.
    """
    require_float32(values)
    require_deviation(deviation)
    step, noised = grid_of(deviation), dict[str, Tensor]()
    for name, value in values.items():
        flat, place = value.detach().cpu().double().flatten(), 0
        for noise in normals(key_of(key, name), flat.numel()):
            on_grid(flat[place : place + len(noise)], noise.mul_(deviation), step)
            place += len(noise)
        noised[name] = flat.to(value.dtype).view(value.shape).to(value.device)
    return noised


def on_grid(values: Tensor, noise: Tensor, step: float) -> None:
    """Add noise to float64 values in place, both as multiples of `step`, so that the sum is exact."""
    values.div_(step).round_().add_(noise.div_(step).round_()).mul_(step)


def require_deviation(deviation: float) -> None:
    """Raise for a standard deviation that is none."""
    if not (math.isfinite(deviation) and deviation > 0):
        raise ValueError(f"noise has a standard deviation above 0, not {deviation}")


def require_float32(values: Tensors) -> None:
    """Raise where a tensor is not float32: shorter floats would round the sum more than the noise allows for."""
    for name, value in values.items():
        if value.dtype != torch.float32:
            raise FedllmError(
                f"Noise is added to float32 only, and '{name}' is {value.dtype}; keep what is trained in float32."
            )
