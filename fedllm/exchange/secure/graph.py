"""Who is whose neighbour: a ring in which each silo knows the same number on either side, in a drawn order.

Bell et al. 2020 (SecAgg+), section 3.1: a Harary graph whose nodes are permuted by chance. Here the order comes from
the hash of all public keys, so every silo draws it for itself and the server cannot choose it outright.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from math import comb

from fedllm.core.seeds import derive


def dealt(names: Sequence[str], groups: int, seed: int, number: int) -> list[list[str]]:
    """Deal the silos of a round out to groups whose sizes differ by one at most; anybody can do it again.

    >>> [len(group) for group in dealt(list("abcdefgh"), 3, 0, 5)]
    [3, 3, 2]
    """
    order = sorted(names, key=lambda name: derive(seed, "group", number, name))
    place = {name: rank % groups for rank, name in enumerate(order)}
    return [[name for name in names if place[name] == group] for group in range(min(groups, len(names)))]


def neighbours_of(silos: int, neighbours: int, context: bytes) -> list[list[int]]:
    """Return each silo's neighbours, in rising order; `neighbours` is even, or all others.

    >>> neighbours_of(4, 3, b"")
    [[1, 2, 3], [0, 2, 3], [0, 1, 3], [0, 1, 2]]
    >>> {len(each) for each in neighbours_of(20, 6, b"x")}
    {6}
    """
    if neighbours >= silos - 1:
        return [[other for other in range(silos) if other != own] for own in range(silos)]
    if neighbours % 2:
        raise ValueError(f"a ring gives each silo an even number of neighbours, not {neighbours}")
    ring = sorted(range(silos), key=lambda own: hashlib.sha256(context + own.to_bytes(4, "big")).digest())
    found = list[list[int]]([[]] * silos)
    for place, own in enumerate(ring):
        steps = range(1, neighbours // 2 + 1)
        found[own] = sorted(ring[(place + side * step) % silos] for step in steps for side in (-1, 1))
    return found


def most_of(bad: int, silos: int, neighbours: int, chance: float) -> int:
    """Return how many of `bad` silos are among `neighbours` drawn ones at most, but for that chance.

    >>> most_of(3, 10, 9, 0.0), most_of(10, 100, 20, 2.0**-40) <= 10
    (3, True)
    """
    if neighbours >= silos - 1 or not bad:
        return min(bad, neighbours)
    bad = min(bad, silos - 1)
    ways = [comb(bad, among) * comb(silos - 1 - bad, neighbours - among) for among in range(neighbours + 1)]
    whole, more = comb(silos - 1, neighbours), sum(ways)
    for most, each in enumerate(ways):
        more -= each
        if more / whole <= chance:
            return most
    return neighbours


def apart_chance(silos: int, neighbours: int, gone: int) -> float:
    """Return at most how likely the ring falls apart when so many silos are gone: then sums of its parts would show.

    It takes two runs of half as many in a row as there are neighbours (Bell et al. 2020, lemma 3.6, for one run).
    """
    if neighbours >= silos - 1 or gone < neighbours:
        return 0.0
    return min(1.0, silos * float(gone / silos) ** (neighbours // 2))
