"""Masks: AES-256 in counter mode, expanded in bulk and added to numbers modulo 2^bits while they are in the cache."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, TypeAlias

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

Numbers: TypeAlias = NDArray[np.unsignedinteger]
"""Whole numbers modulo 2^16 or 2^32, flat."""

CHUNK = 1 << 18
"""Bytes of a mask that are made at a time."""

ZEROS = bytes(CHUNK)


class Mask(NamedTuple):
    """A mask by its key, to be added or taken away."""

    key: bytes
    add: bool


def stream(key: bytes) -> CipherContext:
    """Return an endless stream of bytes for a key that has no other use."""
    return Cipher(algorithms.AES(key), modes.CTR(bytes(16))).encryptor()


def words(cipher: CipherContext, size: int, kind: type[np.unsignedinteger]) -> Numbers:
    """Return the next `size` numbers of a stream."""
    return np.frombuffer(cipher.update(bytes(size * np.dtype(kind).itemsize)), dtype=kind)


def masked(numbers: Numbers, masks: Sequence[Mask]) -> None:
    """Add masks to numbers, in place, modulo 2^bits."""
    streams = [(stream(mask.key), np.add if mask.add else np.subtract) for mask in masks]
    # Counter mode writes no more than it is given, but asks for room for one block more.
    made = bytearray(CHUNK + 16)
    step = CHUNK // numbers.itemsize
    for start in range(0, len(numbers), step):
        piece = numbers[start : start + step]
        mask = np.frombuffer(made, dtype=numbers.dtype, count=len(piece))
        for cipher, apply in streams:
            cipher.update_into(memoryview(ZEROS)[: piece.nbytes], made)
            apply(piece, mask, out=piece)
