"""A shuffled order of examples, of which each place is reckoned when it is needed: no list of it is held."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence

from fedllm.core.seeds import derive
from fedllm.silo.examples import Example

TURNS = 4
"""Rounds of the Feistel network."""


def draws(examples: Sequence[Example], batch_size: int, first: int, count: int, seed: int) -> Iterator[list[Example]]:
    """Yield batches number `first` to `first + count`, as `examples.draws` does, without a list of the whole order.

    Every epoch is a permutation of all examples of its own, of which a place is reckoned when it is needed: a batch
    depends on its number and the seed alone, and memory not on the number of examples.
    """
    for number in range(first, first + count):
        places = range(number * batch_size, (number + 1) * batch_size)
        yield [
            examples[permuted(place % len(examples), len(examples), derive(seed, "epoch", place // len(examples)))]
            for place in places
        ]


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
