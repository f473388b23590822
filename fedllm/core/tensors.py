"""Arithmetic over flat mappings of tensors, and the check of what a silo sends."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.types import Tensors

CHUNK = 1 << 18
"""Values worked on at a time: temporaries stay in the cache, and threads meet seldom."""


def pieces(tensors: Iterable[Tensor]) -> Iterator[Tensor]:
    """Yield the tensors' values in order, flat, about `CHUNK` at a time: small ones together, large ones cut.

    >>> [piece.numel() for piece in pieces([torch.zeros(3, 2), torch.zeros(5), torch.zeros(CHUNK + 1)])]
    [11, 262144, 1]
    """
    small, count = list[Tensor](), 0

    def together() -> Tensor:
        return torch.cat(small) if len(small) > 1 else small[0]

    for tensor in tensors:
        flat = tensor.flatten()
        if count + flat.numel() > CHUNK and small:
            yield together()
            small, count = [], 0
        if flat.numel() > CHUNK:
            yield from torch.split(flat, CHUNK)
        else:
            small.append(flat)
            count += flat.numel()
    if small:
        yield together()


def whole_again(cut: Iterable[Tensor], like: Tensors) -> dict[str, Tensor]:
    """Return the tensors whose `pieces` are `cut`, with the names, shapes and dtypes of `like`.

    >>> like = {"a": torch.ones(3, 2), "b": torch.ones(CHUNK + 1)}
    >>> again = whole_again(pieces(like.values()), like)
    >>> all(torch.equal(again[name], value) for name, value in like.items())
    True
    """
    whole = {name: torch.empty_like(value, memory_format=torch.contiguous_format) for name, value in like.items()}
    rest = iter(cut)
    piece = torch.empty(0)
    for value in whole.values():
        flat = value.view(-1)
        while flat.numel():
            piece = piece if piece.numel() else next(rest)
            size = min(flat.numel(), piece.numel())
            flat[:size].copy_(piece[:size])
            flat, piece = flat[size:], piece[size:]
    return whole


def subtract(left: Tensors, right: Tensors) -> dict[str, Tensor]:
    """Return left - right, name by name, over the names of `left`."""
    return {name: value - right[name] for name, value in left.items()}


def norm(tensors: Tensors) -> Tensor:
    """Return the L2 norm over all tensors together, as a scalar tensor."""
    each = [torch.linalg.vector_norm(value, dtype=torch.float32) for value in tensors.values()]
    whole: Tensor = torch.linalg.vector_norm(torch.stack(each))
    return whole


def own_norm(value: Tensor) -> Tensor:
    """Return the L2 norm of one tensor as float32: infinite where it is too large for that."""
    wide = value.dtype if value.dtype in (torch.float32, torch.float64) else torch.float32
    norm: Tensor = torch.linalg.vector_norm(value, dtype=wide)
    return norm if wide == torch.float32 else norm.float()


def quick_norm(value: Tensor) -> Tensor:
    """Return the L2 norm of one tensor in its own dtype, several times faster than `own_norm`."""
    norm: Tensor = torch._foreach_norm([value])[0]
    return norm


def under(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors with `prefix/` before every name.

    >>> list(under("params", {"a": torch.zeros(1)}))
    ['params/a']
    """
    return {f"{prefix}/{name}": value for name, value in tensors.items()}


def below(prefix: str, tensors: Tensors) -> dict[str, Tensor]:
    """Return the tensors whose name starts with `prefix/`, without it."""
    start = f"{prefix}/"
    return {name.removeprefix(start): value for name, value in tensors.items() if name.startswith(start)}


def require_shapes(tensors: Tensors, like: Tensors) -> None:
    """Raise `Refused` unless names, shapes and dtypes are those of `like`; looks at no number."""
    if tensors.keys() != like.keys():
        missing, extra = sorted(like.keys() - tensors.keys()), sorted(tensors.keys() - like.keys())
        raise Refused(f"wrong names: {len(missing)} missing {missing[:2]}, {len(extra)} unknown {extra[:2]}")
    for name, expected in like.items():
        value = tensors[name]
        if value.shape != expected.shape:
            raise Refused(f"'{name}' has shape {tuple(value.shape)}, expected {tuple(expected.shape)}")
        if value.dtype != expected.dtype:
            raise Refused(f"'{name}' has dtype {value.dtype}, expected {expected.dtype}")


def require_like(tensors: Tensors, like: Tensors) -> None:
    """Raise `Refused` unless names, shapes and dtypes are those of `like`, and every number and norm is finite."""
    require_shapes(tensors, like)
    floats = {name: value for name, value in tensors.items() if value.is_floating_point()}
    # One look at the norms finds every value that is not finite, and those so large that nothing can be reckoned with.
    norms = list(torch._foreach_norm(list(floats.values()))) if floats else []
    if norms and not bool(torch.stack(norms).float().isfinite().all()):
        for name, value in floats.items():
            if not bool(value.isfinite().all()):
                raise Refused(f"'{name}' is not finite")
            if not bool(own_norm(value).isfinite()):
                raise Refused(f"'{name}' has values up to {float(value.abs().max()):.0e}, too large to add up")
