"""Memory for large tensors, each its own: the system has it back with the tensor.

Among tensors that come and go, those that stay leave holes in the heap when they are replaced, which no tensor of their
size fits into, since it asks for aligned memory; they came to three more models (`benchmarks/server_memory.py`).
"""

from __future__ import annotations

import ctypes
import mmap
import sys

import torch
from torch import Tensor

LEAST = 1 << 18
"""Bytes from which on a tensor has memory of its own: whole pages, which a small one would not fill."""


def room_for(like: Tensor, device: torch.device | str | None = None) -> Tensor:
    """Return a contiguous tensor of that shape and dtype, and of that device unless another is given, to be written.

    >>> room_for(torch.zeros(LEAST, 2)).shape, room_for(torch.zeros(3, dtype=torch.int8)).dtype
    (torch.Size([262144, 2]), torch.int8)
    """
    place = torch.device(device or like.device)
    if like.nbytes < LEAST or place.type != "cpu":
        return torch.empty(like.shape, dtype=like.dtype, device=place)
    own = {} if sys.platform == "win32" else {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS}
    memory = mmap.mmap(-1, like.nbytes, **own)
    return torch.frombuffer(memory, dtype=like.dtype).view(like.shape)


def give_back() -> None:
    """Have the C library give the system what it keeps free, such as after a model was loaded; only glibc can."""
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):
        trim(0)
