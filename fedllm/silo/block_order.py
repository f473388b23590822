"""A shuffled order of examples, of which each place is reckoned when it is needed: no list of it is held."""

from __future__ import annotations

import hashlib

from fedllm.core.seeds import derive

TURNS = 4
"""Rounds of the Feistel network."""


def reckoned(place: int, size: int, seed: int) -> int:
    """Return the example at a place of an endless reading of `size` of them, every epoch in an order of its own."""
    return permuted(place % size, size, derive(seed, "epoch", place // size))


def permuted(place: int, size: int, seed: int) -> int:
    """Return where a permutation of 0 to `size` - 1, drawn from `seed`, takes a place.

    A Feistel network over the next power of four, followed until it is back inside (Black and Rogaway 2002, Ciphers
    with arbitrary finite domains, cycle-walking).

    >>> sorted(permuted(place, 5, 0) for place in range(5))
    [0, 1, 2, 3, 4]
    """
    half = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = place >> half, place & mask
        for turn in range(TURNS):
            mixed = hashlib.blake2b(f"{seed} {turn} {right}".encode(), digest_size=8).digest()
            left, right = right, left ^ (int.from_bytes(mixed, "big") & mask)
        place = left << half | right
        if place < size:
            return place
