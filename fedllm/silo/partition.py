"""One dataset split into silos: by a column, evenly, by skewed labels or topics, by skewed sizes.

Every row lands in exactly one silo, and the same seed gives the same silos.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterator, Sequence
from itertools import cycle

import numpy as np

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.silo.groups import labels_of
from fedllm.silo.sources import Row, require_columns
from fedllm.silo.spooled import picked

Silos = dict[str, Sequence[Row]]

ATTEMPTS = 1000
"""The draws of sizes before giving up on the minimum."""


def by_column(rows: Sequence[Row], column: str) -> Silos:
    """Make one silo of each value of `column`, named after it so that files and TOML keys can be."""
    require_columns(rows, [column], "The data to split")
    parts: dict[str, list[int]] = defaultdict(list)
    for place, row in enumerate(rows):
        parts[str(row[column])].append(place)
    names: dict[str, str] = {}
    for value in sorted(parts):
        plain = _plain(value)
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}_{number}", number + 1
        names[name] = value
    return {name: picked(rows, parts[names[name]]) for name in sorted(names)}


def iid(rows: Sequence[Row], silos: int, seed: int = 0) -> Silos:
    """Deal the rows out at random; sizes differ by one at most."""
    _check_count(rows, silos)
    order = _random(seed, "iid").permutation(len(rows))
    return _named(picked(rows, sorted(part.tolist())) for part in np.array_split(order, silos))


def dirichlet(
    rows: Sequence[Row],
    silos: int,
    alpha: float,
    column: str | None = None,
    clusters: int = 10,
    text: str | Sequence[str] | None = None,
    seed: int = 0,
) -> Silos:
    """Give each silo a mixture of labels of its own, as in Hsu et al. 2019 (arXiv:1909.06335).

    Each silo draws q ~ Dirichlet(alpha * p), p being the labels' shares of all rows, and its rows one by
    one without replacement: a label from q, then a row of it at random. Sizes are equal to within one.
    As there, a label that is used up leaves q, which is renormalised; unlike there, silos take turns, so
    that the last one is not left with what nobody wanted, and a silo all of whose labels are used up
    draws from what is left. Labels are the values of `column` or, without one, k-means `clusters` of
    the columns in `text` (of all text when None).
    """
    _check_count(rows, silos)
    _check_alpha(alpha)
    labels = labels_of(rows, column, clusters, text, seed)
    random = _random(seed, "dirichlet")
    kinds = sorted(set(labels))
    piles = [random.permutation([i for i, label in enumerate(labels) if label == kind]).tolist() for kind in kinds]
    left = np.array([len(pile) for pile in piles], dtype=float)
    mixtures = random.dirichlet(alpha * left / left.sum(), size=silos)
    parts: list[list[int]] = [[] for _ in range(silos)]
    for _, (mixture, part) in zip(rows, cycle(zip(mixtures, parts, strict=True)), strict=False):
        wanted = np.where(left > 0, mixture, 0.0)
        sums = np.cumsum(wanted if wanted.sum() > 0 else left)
        kind = int(np.searchsorted(sums, random.random() * sums[-1], side="right"))
        part.append(piles[kind].pop())
        left[kind] -= 1
    return _named(picked(rows, sorted(part)) for part in parts)


def by_label(rows: Sequence[Row], silos: int, column: str, seed: int = 0) -> Silos:
    """Deal the values of `column` out at random, so that no two silos have one in common.

    It is the end of the pathological split of McMahan et al. 2017 (arXiv:1602.05629). The silos' numbers of values
    differ by one at most, their sizes by how many rows have them.
    """
    require_columns(rows, [column], "The data to split")
    kinds = sorted({str(row[column]) for row in rows})
    if not 1 <= silos <= len(kinds):
        raise FedllmError(
            f"The column '{column}' has {len(kinds)} values, which cannot be dealt out to {silos} silos; give 1 to "
            f"{len(kinds)} silos."
        )
    order = _random(seed, "by_label").permutation(len(kinds))
    holder = {kinds[kind]: place % silos for place, kind in enumerate(order.tolist())}
    return _named([row for row in rows if holder[str(row[column])] == silo] for silo in range(silos))


def quantity(rows: Sequence[Row], silos: int, alpha: float, seed: int = 0, at_least: int = 8) -> Silos:
    """Skew the sizes only: shares ~ Dirichlet(alpha), rows at random (Li et al. 2022, arXiv:2102.02079).

    As there, shares are drawn again until every silo has `at_least` rows.
    """
    _check_count(rows, silos)
    _check_alpha(alpha)
    random = _random(seed, "quantity")
    order = random.permutation(len(rows))
    for _ in range(ATTEMPTS):
        ends = np.round(np.cumsum(random.dirichlet([alpha] * silos))[:-1] * len(rows)).astype(int)
        parts = np.split(order, ends)
        if min(map(len, parts)) >= max(at_least, 1):
            return _named(picked(rows, sorted(part.tolist())) for part in parts)
    raise FedllmError(
        f"{len(rows)} rows in {silos} silos with alpha {alpha} did not give each silo at least {at_least} in "
        f"{ATTEMPTS} draws; raise alpha, lower at_least, or take fewer silos."
    )


def _random(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "partition", what))


def _check_count(rows: Sequence[Row], silos: int) -> None:
    if not 1 <= silos <= len(rows):
        raise FedllmError(f"{len(rows)} rows cannot be split into {silos} silos; give 1 to {len(rows)} silos.")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise FedllmError(f"The Dirichlet's alpha is {alpha}; give a number above 0, smaller for more skew.")


def _named(parts: Iterator[Sequence[Row]]) -> Silos:
    found = list(parts)
    digits = max(2, len(str(len(found) - 1)))
    return {f"silo_{number:0{digits}d}": part for number, part in enumerate(found)}


def _plain(value: str) -> str:
    letters = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    # Lower case, since some file systems do not tell the cases apart.
    plain = re.sub(r"[^a-z0-9]+", "_", letters).strip("_")[:48]
    return plain or "silo_" + hashlib.blake2b(value.encode("utf-8", "replace"), digest_size=3).hexdigest()
