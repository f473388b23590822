"""A 32-byte secret as shares, any `threshold` of which bring it back: Shamir's, over GF(2^128), by pycryptodome."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from itertools import combinations, islice

from Crypto.Protocol.SecretSharing import Shamir

from fedllm.core.errors import Refused

HALF = 16

TRIES = 200
"""Sets of shares that are tried where some do not fit together."""


def split(secret: bytes, threshold: int, holders: int) -> list[bytes]:
    """Return one share of 32 bytes for each holder; fewer than `threshold` of them tell nothing."""
    halves = [Shamir.split(threshold, holders, part, ssss=False) for part in (secret[:HALF], secret[HALF:])]
    return [bytes(first[1] + second[1]) for first, second in zip(*halves, strict=True)]


def joined(shares: Mapping[int, bytes], threshold: int, right: Callable[[bytes], bool]) -> bytes:
    """Return the secret of these shares, by the places of their holders; a few that are forged do no harm.

    Raises:
        Refused: where there are too few shares, or none of the sets tried gives a secret that is `right`.
    """
    if len(shares) < threshold:
        raise Refused(f"{len(shares)} shares came and {threshold} are needed")
    for chosen in islice(combinations(sorted(shares.items()), threshold), TRIES):
        halves = [[(place + 1, share[part : part + HALF]) for place, share in chosen] for part in (0, HALF)]
        secret = b"".join(Shamir.combine(half, ssss=False) for half in halves)
        if right(secret):
            return secret
    raise Refused("shares do not fit together: one was forged")
