"""One dataset split into silos: by a column, evenly, by skewed labels or topics, by skewed sizes.

Every row lands in exactly one silo, and the same seed gives the same silos.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from itertools import cycle
from typing import Any

import numpy as np

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.silo.sources import Row, require_columns

Silos = dict[str, list[Row]]

FEATURES = 1024
"""The buckets that words are hashed into."""

SEEN = 2000
"""The characters of a text that are looked at: enough to tell its topic."""

FITTED = 2048
"""The rows that the cluster centres are fitted to; the others are given the nearest."""

STARTS = 4
"""The fits of which the closest is taken."""

ATTEMPTS = 1000
"""The draws of sizes before giving up on the minimum."""

GROUPS = 12
"""The groups that a picture can tell apart, `other` among them."""

WORD = re.compile(r"[^\W\d_]{3,}")


def by_column(rows: Sequence[Row], column: str) -> Silos:
    """Make one silo of each value of `column`, named after it so that files and TOML keys can be."""
    require_columns(rows, [column], "The data to split")
    parts: dict[str, list[Row]] = defaultdict(list)
    for row in rows:
        parts[str(row[column])].append(row)
    names: dict[str, str] = {}
    for value in sorted(parts):
        plain = _plain(value)
        name, number = plain, 2
        while name in names:
            name, number = f"{plain}_{number}", number + 1
        names[name] = value
    return {name: parts[names[name]] for name in sorted(names)}


def iid(rows: Sequence[Row], silos: int, seed: int = 0) -> Silos:
    """Deal the rows out at random; sizes differ by one at most."""
    _check_count(rows, silos)
    order = _random(seed, "iid").permutation(len(rows))
    return _named([rows[i] for i in sorted(part.tolist())] for part in np.array_split(order, silos))


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
    labels = _labels(rows, column, clusters, text, seed)
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
    return _named([rows[i] for i in sorted(part)] for part in parts)


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
            return _named([rows[i] for i in sorted(part.tolist())] for part in parts)
    raise FedllmError(
        f"{len(rows)} rows in {silos} silos with alpha {alpha} did not give each silo at least {at_least} in "
        f"{ATTEMPTS} draws; raise alpha, lower at_least, or take fewer silos."
    )


def who_holds_what(silos: Mapping[str, Sequence[Row]], column: str | None) -> dict[str, Any]:
    """Count each silo's rows by the values of `column` or, when None, by clusters named by their words.

    Returns `groups` (the largest first, at most 12 with `other`), `counts` (silo -> rows of each group),
    and `rows` and `words` of each silo.
    """
    everything = [row for rows in silos.values() for row in rows]
    labels = _labels(everything, column, 10, None, 0) if everything else []
    if column is None:
        labels = _named_clusters([_text_of(row, None) for row in everything], labels)
    sizes = Counter(labels)
    groups = sorted(sizes, key=lambda group: (-sizes[group], group))
    if len(groups) > GROUPS:
        kept = [group for group in groups if group != "other"][: GROUPS - 1]
        labels = [label if label in kept else "other" for label in labels]
        groups = [*kept, "other"]
    following = iter(labels)
    counts = {name: Counter(next(following) for _ in rows) for name, rows in silos.items()}
    return {
        "groups": groups,
        "counts": {name: [count[group] for group in groups] for name, count in counts.items()},
        "rows": {name: len(rows) for name, rows in silos.items()},
        "words": {name: sum(len(_text_of(row, None).split()) for row in rows) for name, rows in silos.items()},
    }


def _random(seed: int, what: str) -> np.random.Generator:
    return np.random.default_rng(derive(seed, "partition", what))


def _check_count(rows: Sequence[Row], silos: int) -> None:
    if not 1 <= silos <= len(rows):
        raise FedllmError(f"{len(rows)} rows cannot be split into {silos} silos; give 1 to {len(rows)} silos.")


def _check_alpha(alpha: float) -> None:
    if not 0 < alpha < float("inf"):
        raise FedllmError(f"The Dirichlet's alpha is {alpha}; give a number above 0, smaller for more skew.")


def _named(parts: Iterator[list[Row]]) -> Silos:
    found = list(parts)
    digits = max(2, len(str(len(found) - 1)))
    return {f"silo_{number:0{digits}d}": part for number, part in enumerate(found)}


def _plain(value: str) -> str:
    letters = unicodedata.normalize("NFKD", value).encode("ascii", "ignore").decode().lower()
    # Lower case, since some file systems do not tell the cases apart.
    plain = re.sub(r"[^a-z0-9]+", "_", letters).strip("_")[:48]
    return plain or "silo_" + hashlib.blake2b(value.encode("utf-8", "replace"), digest_size=3).hexdigest()


def _labels(
    rows: Sequence[Row], column: str | None, clusters: int, text: str | Sequence[str] | None, seed: int
) -> list[str]:
    if column is not None:
        require_columns(rows, [column], "The data to split")
        return [str(row[column]) for row in rows]
    columns = [text] if isinstance(text, str) else text
    if columns is not None:
        require_columns(rows, columns, "The data to split")
    if clusters < 1:
        raise FedllmError(f"clusters is {clusters}; it must be at least 1.")
    found = _clusters([_text_of(row, columns) for row in rows], clusters, derive(seed, "partition", "clusters"))
    return [f"{number:04d}" for number in found]


def _text_of(value: Any, columns: Sequence[str] | None) -> str:
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value[column] for column in columns] if columns is not None else list(value.values())
    return "\n".join(filter(None, (_text_of(item, None) for item in value))) if isinstance(value, list | tuple) else ""


def _words(text: str) -> list[str]:
    return WORD.findall(text[:SEEN].lower())


def _clusters(texts: Sequence[str], clusters: int, seed: int) -> list[int]:
    """Return each text's k-means cluster, over unit vectors of hashed TF-IDF."""
    from scipy.cluster.vq import kmeans2, vq

    features = _tf_idf(texts)
    random = np.random.default_rng(seed)
    chosen = np.sort(random.permutation(len(texts))[:FITTED])
    sample = features[chosen].toarray()
    # Asked for more centres than there are different points, k-means++ would divide by zero.
    clusters = min(clusters, len({point.tobytes() for point in sample}))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a centre that loses all its points is harmless here
        starts = [kmeans2(sample, clusters, minit="++", seed=random)[0] for _ in range(STARTS)]
    # One start alone can end where two topics share a centre; the closest fit is the one to take.
    centres = min(starts, key=lambda points: float(np.square(vq(sample, points)[1]).sum()))
    blocks = [features[at : at + FITTED].toarray() for at in range(0, len(texts), FITTED)]
    return [int(label) for block in blocks for label in vq(block, centres)[0]]


def _tf_idf(texts: Sequence[str]) -> Any:
    from scipy.sparse import csr_matrix

    counts = [Counter(zlib.crc32(word.encode()) % FEATURES for word in _words(text)) for text in texts]
    held = Counter(bucket for count in counts for bucket in count)
    data: list[float] = []
    columns: list[int] = []
    starts = [0]
    for count in counts:
        buckets = sorted(count)
        weights = [(1 + np.log(count[b])) * np.log((1 + len(texts)) / (1 + held[b])) for b in buckets]
        norm = float(np.linalg.norm(weights)) or 1.0
        data += [weight / norm for weight in weights]
        columns += buckets
        starts.append(len(columns))
    return csr_matrix((data, columns, starts), shape=(len(texts), FEATURES))


def _named_clusters(texts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Name clusters by three words: in many of its texts (tf) and in few of all texts (idf)."""
    words = [{word for word in _words(text) if len(word) > 3} for text in texts]
    held = Counter(word for found in words for word in found)
    sizes = Counter(labels)
    inside: dict[str, Counter[str]] = defaultdict(Counter)
    for found, label in zip(words, labels, strict=True):
        inside[label].update(found)
    names: dict[str, str] = {}
    for label in sorted(sizes):
        shares = {word: count / sizes[label] for word, count in inside[label].items()}
        rarity = {word: np.log((1 + len(texts)) / held[word]) for word in shares}
        scores = {word: share * rarity[word] * (np.log(share) + rarity[word]) for word, share in shares.items()}
        best = sorted(scores, key=lambda word: (-scores[word], word))[:3]
        name = ", ".join(best) or "no words"
        names[label] = name if name not in names.values() else f"{name} ({label})"
    return [names[label] for label in labels]
