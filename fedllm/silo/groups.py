"""Groups of rows: by a column, or by what their texts are about."""

from __future__ import annotations

import re
import warnings
import zlib
from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.silo.sources import Row, require_columns

FEATURES = 1024
"""The buckets that words are hashed into."""

SEEN = 2000
"""The characters of a text that are looked at: enough to tell its topic."""

FITTED = 2048
"""The rows that the cluster centres are fitted to; the others are given the nearest."""

STARTS = 4
"""The fits of which the closest is taken."""

GROUPS = 12
"""The groups that a picture can tell apart, `other` among them."""

WORD = re.compile(r"[^\W\d_]{3,}")


def who_holds_what(silos: Mapping[str, Sequence[Row]], column: str | None) -> dict[str, Any]:
    """Count each silo's rows by the values of `column` or, when None, by clusters named by their words.

    Returns `groups` (the largest first, at most 12 with `other`), `counts` (silo -> rows of each group),
    and `rows` and `words` of each silo.
    """
    everything = [row for rows in silos.values() for row in rows]
    labels = labels_of(everything, column, 10, None, 0) if everything else []
    if column is None:
        labels = named_clusters([text_of(row, None) for row in everything], labels)
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
        "words": {name: sum(len(text_of(row, None).split()) for row in rows) for name, rows in silos.items()},
    }


def labels_of(
    rows: Sequence[Row], column: str | None, clusters: int, text: str | Sequence[str] | None, seed: int
) -> list[str]:
    """Return each row's group: its value of `column` or, when None, the cluster of its text."""
    if column is not None:
        require_columns(rows, [column], "The data to split")
        return [str(row[column]) for row in rows]
    columns = [text] if isinstance(text, str) else text
    if columns is not None:
        require_columns(rows, columns, "The data to split")
    if clusters < 1:
        raise FedllmError(f"clusters is {clusters}; it must be at least 1.")
    found = cluster_of([text_of(row, columns) for row in rows], clusters, derive(seed, "partition", "clusters"))
    return [f"{number:04d}" for number in found]


def text_of(value: Any, columns: Sequence[str] | None) -> str:
    """Return the text in a row's columns (None: in all of them), also inside lists and objects."""
    if isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        value = [value[column] for column in columns] if columns is not None else list(value.values())
    return "\n".join(filter(None, (text_of(item, None) for item in value))) if isinstance(value, list | tuple) else ""


def words_of(text: str) -> list[str]:
    """Return the lower-case words of three letters or more near the start of a text."""
    return WORD.findall(text[:SEEN].lower())


def cluster_of(texts: Sequence[str], clusters: int, seed: int) -> list[int]:
    """Return each text's k-means cluster, over unit vectors of hashed TF-IDF."""
    from scipy.cluster.vq import kmeans2, vq

    features = tf_idf(texts)
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


def tf_idf(texts: Sequence[str]) -> Any:
    """Return unit vectors of hashed term frequency times inverse document frequency, as a sparse matrix."""
    from scipy.sparse import csr_matrix

    counts = [Counter(zlib.crc32(word.encode()) % FEATURES for word in words_of(text)) for text in texts]
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


def named_clusters(texts: Sequence[str], labels: Sequence[str]) -> list[str]:
    """Name clusters by three words: in many of its texts (tf) and in few of all texts (idf)."""
    words = [{word for word in words_of(text) if len(word) > 3} for text in texts]
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
