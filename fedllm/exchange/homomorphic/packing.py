"""An update's whole numbers laid out for ciphertexts, with tags that show whose sum it is.

In every ciphertext a few slots hold the silo's tag of this round, which only who has the key can make. Tags add up with
the rest: whoever opens a sum knows the tags of the silos that it is said to be of, and refuses another sum.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from fedllm.core.noise import key_of
from fedllm.exchange.homomorphic.ckks import SLOTS, Numbers
from fedllm.exchange.homomorphic.messages import Terms
from fedllm.exchange.secure.masks import stream, words

TAGS = 4
"""Slots of a ciphertext with its tag, of 20 bits each."""

BESIDE = 2
"""Numbers before those of an update: a one for each silo, its weight."""

HALF = 1 << 16
"""What the second number of a pair is worth."""


def rows_for(values: int, bits: int) -> int:
    """Return how many ciphertexts hold so many values of an update, and what stands before them.

    >>> rows_for(2 * (2044 - 2), 16), rows_for(2042, 32), rows_for(2043, 32)
    (1, 1, 2)
    """
    return -(-(BESIDE + numbers_for(values, bits)) // (SLOTS - TAGS))


def numbers_for(values: int, bits: int) -> int:
    """Return as how many numbers so many values are encrypted."""
    return -(-values // 2) if bits == 16 else values


def paired(values: Numbers, bits: int) -> Numbers:
    """Return two numbers of 16 bits as one: sums stay apart as long as each has room in 16 bits.

    >>> paired(np.array([5, -1, 7]), 16).tolist()
    [-65531, 7]
    """
    if bits != 16:
        return values
    even = np.append(values, 0) if len(values) % 2 else values
    return even[::2] + HALF * even[1::2]


def unpaired(numbers: Numbers, values: int, bits: int) -> Numbers:
    """Return what was paired, or a sum of it.

    >>> unpaired(np.array([-65531, 7]), 3, 16).tolist()
    [5, -1, 7]
    """
    if bits != 16:
        return numbers
    low = (numbers + HALF // 2) % HALF - HALF // 2
    return np.stack([low, (numbers - low) // HALF], axis=1).ravel()[:values]


def laid_out(numbers: Numbers, tags: Numbers) -> Numbers:
    """Return numbers as rows of slots, each with its tag before them."""
    rows = len(tags)
    room = np.zeros(rows * (SLOTS - TAGS), np.int64)
    room[: len(numbers)] = numbers
    return np.concatenate([tags, room.reshape(rows, -1)], axis=1)


def taken_apart(slots: Numbers, count: int) -> tuple[Numbers, Numbers]:
    """Return the first `count` numbers of rows of slots, and their tags."""
    return slots[:, TAGS:].ravel()[:count], slots[:, :TAGS]


def tags_of(key: bytes, terms: Terms, names: Iterable[str], rows: int) -> Numbers:
    """Return the sum of these silos' tags in a round."""
    total = np.zeros((rows, TAGS), np.int64)
    for name in names:
        own = stream(key_of(key, "tag", terms.nonce, terms.round, terms.asked, name))
        total += (words(own, rows * TAGS, np.uint32) >> 12).astype(np.int64).reshape(rows, TAGS)
    return total
