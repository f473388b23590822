"""What a silo counts for a tokenizer: how often two symbols stand beside each other in its words, never the words.

A symbol is a byte (0 to 255) or a merge (256 + its place in the list of merges). Suffixes of arrays: S symbols of all
different words one after the other, W words, P pairs, M merges, D documents remembered of a word.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from fedllm.core.errors import FedllmError
from fedllm.core.types import Tensors

BYTES = 256
"""The symbols that there are before any merge."""

END = -1
"""What stands after each word."""

CUT = re.compile(r"(?<=[!-~])(?= )")
"""Places where the pre-tokeniser always cuts, whatever stands around them: it is asked about each piece only once."""

Ints = NDArray[Any]


class Words(NamedTuple):
    """The different words of a silo as symbols, how often each is there, and in which documents (the first few)."""

    symbols_S: Ints
    counts_W: NDArray[np.float64]
    documents_WD: Ints


class Pairs(NamedTuple):
    """Pairs of neighbours as `left << 32 | right`, rising, and the count of each."""

    keys_P: Ints
    counts_P: NDArray[np.float64]


def pre_tokenizer() -> Any:
    """Return what cuts text into words: GPT-2's rule over bytes, as in the `tokenizers` library."""
    from tokenizers import pre_tokenizers

    return pre_tokenizers.ByteLevel(add_prefix_space=False)


def count_words(texts: Iterable[str], contribution: float | None = None, remembered: int = 0) -> Words:
    """Count the words of a silo's texts, one text a document.

    With `contribution` a text counts for less where the L2 norm of its counts of neighbouring bytes is above that, as
    in clipping. The norm of its counts of pairs then stays within the bound after any merges: to merge splits counts
    (what was `x a` is then `x a` or `x ab`) or takes them away, and adds none together. `remembered` documents are
    noted of each word at most.
    """
    pieces: dict[str, float] = defaultdict(float)
    seen: dict[str, list[int]] = defaultdict(list)
    for number, text in enumerate(texts):
        share = 1.0 if contribution is None else min(1.0, contribution / max(1.0, byte_norm(text)))
        for piece, count in Counter(CUT.split(text)).items():
            pieces[piece] += share * count
            if len(seen[piece]) < remembered:
                seen[piece].append(number)
    cutter = pre_tokenizer()
    counts: dict[bytes, float] = defaultdict(float)
    places: dict[bytes, set[int]] = defaultdict(set)
    for piece, total in pieces.items():
        require_utf8(piece)
        for _, (start, end) in cutter.pre_tokenize_str(piece):
            word = piece[start:end].encode()
            counts[word] += total
            if len(places[word]) < remembered:
                places[word].update(seen[piece])
    documents_WD = np.full((len(counts), remembered), -1, np.int32)
    for row, word in zip(documents_WD, counts, strict=True):
        first = sorted(places[word])[:remembered]
        row[: len(first)] = first
    return Words(as_symbols(list(counts)), np.array(list(counts.values()), np.float64), documents_WD)


def require_utf8(text: str) -> None:
    """Raise unless UTF-8 can write the text."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise FedllmError(
            f"A text cannot be written as UTF-8 ({text[:40]!a}); add the cleaning step 'utf8', which drops its row."
        ) from error


def byte_norm(text: str) -> float:
    """Return the L2 norm of a text's counts of neighbouring bytes."""
    values = np.frombuffer(text.encode("utf-8", "replace"), np.uint8).astype(np.int64)
    return float(np.linalg.norm(np.bincount(values[:-1] << 8 | values[1:])))


def as_symbols(words: Sequence[bytes]) -> Ints:
    """Return the words' bytes one after the other, `END` after each."""
    lengths_W = np.array([len(word) for word in words], np.int64)
    symbols_S = np.full(int(lengths_W.sum()) + len(words), END, np.int32)
    inside_S = np.ones(len(symbols_S), bool)
    inside_S[np.cumsum(lengths_W + 1) - 1] = False
    symbols_S[inside_S] = np.frombuffer(b"".join(words), np.uint8)
    return symbols_S


def merged(words: Words, merges_M2: Ints, first: int = 0) -> Words:
    """Return the words after the merges from number `first` on, each one over all words before the next.

    >>> merged(Words(as_symbols([b"aaab"]), np.ones(1), np.zeros((1, 0))), np.array([[97, 97], [256, 97]])).symbols_S
    array([257,  98,  -1], dtype=int32)
    """
    symbols_S = words.symbols_S
    for start, end in groups(merges_M2.tolist(), first):
        symbols_S = merge_group(symbols_S, merges_M2[start:end], BYTES + start)
    return words._replace(symbols_S=symbols_S)


def groups(merges: Sequence[Sequence[int]], first: int) -> Iterator[tuple[int, int]]:
    """Cut the merges into runs whose members cannot meet, so that a run is one pass over the words."""
    start, lefts, rights = first, set[int](), set[int]()
    for place in range(first, len(merges)):
        left, right = merges[place]
        if left in rights or right in lefts or max(left, right) >= BYTES + start:
            yield start, place
            start, lefts, rights = place, set(), set()
        lefts.add(left)
        rights.add(right)
    if start < len(merges):
        yield start, len(merges)


def merge_group(symbols_S: Ints, merges_M2: Ints, new: int) -> Ints:
    """Put the symbols `new`, `new + 1`... where pairs that cannot meet stand; of `aaa` the first two merge."""
    order = np.argsort(wanted := key_of(merges_M2[:, 0], merges_M2[:, 1]))
    wanted = wanted[order]
    keys_S = key_of(symbols_S[:-1], symbols_S[1:])
    place_S = np.minimum(np.searchsorted(wanted, keys_S), len(wanted) - 1)
    hits = np.flatnonzero(wanted[place_S] == keys_S)
    same = hits[symbols_S[hits] == symbols_S[hits + 1]]
    if len(same):
        run_starts = np.maximum.accumulate(np.where(np.diff(same, prepend=-2) > 1, same, 0))
        hits = np.setdiff1d(hits, same[(same - run_starts) % 2 == 1], assume_unique=True)
    symbols_S = symbols_S.copy()
    symbols_S[hits] = new + order[place_S[hits]]
    return np.delete(symbols_S, hits + 1)


def key_of(left: Ints, right: Ints) -> Ints:
    """Return one number for each pair; negative where a word ends."""
    ends = (left < 0) | (right < 0)
    keys: Ints = np.where(ends, -1, left.astype(np.int64) << 32 | right.astype(np.int64))
    return keys


def count_pairs(words: Words, at_least: float, documents: int) -> Pairs:
    """Count the neighbours; only those counted `at_least` times, in that many documents or more."""
    keys_S = key_of(words.symbols_S[:-1], words.symbols_S[1:])
    word_S = np.cumsum(words.symbols_S[:-1] == END)
    keys_S, word_S = keys_S[keys_S >= 0], word_S[keys_S >= 0]
    keys_P, place_S = np.unique(keys_S, return_inverse=True)
    counts_P = np.bincount(place_S, weights=words.counts_W[word_S], minlength=len(keys_P)).astype(np.float64)
    kept_P = counts_P >= at_least
    if documents > 1:
        kept_P &= spread(place_S, words.documents_WD[:, :documents], word_S, kept_P)
    return Pairs(keys_P[kept_P], counts_P[kept_P])


def spread(place_S: Ints, documents_WD: Ints, word_S: Ints, asked_P: NDArray[np.bool_]) -> NDArray[np.bool_]:
    """Say which of the pairs asked about are in D documents; exact, as a word remembers D, or all that it is in."""
    full_S = documents_WD[word_S, -1] >= 0
    found_P = np.bincount(place_S, weights=full_S, minlength=len(asked_P)) > 0
    open_S = (asked_P & ~found_P)[place_S]
    documents_SD = documents_WD[word_S[open_S]].astype(np.int64)
    both = (place_S[open_S, None].astype(np.int64) << 32 | documents_SD)[documents_SD >= 0]
    documents_P = np.bincount(np.unique(both) >> 32, minlength=len(asked_P))
    result: NDArray[np.bool_] = found_P | (documents_P >= documents_WD.shape[1])
    return result


def most(pairs: Pairs, limit: int) -> Pairs:
    """Return the `limit` most frequent pairs; of equals those of the lower symbols."""
    if len(pairs.keys_P) <= limit:
        return pairs
    kept = np.sort(np.lexsort((pairs.keys_P, -pairs.counts_P))[:limit])
    return Pairs(pairs.keys_P[kept], pairs.counts_P[kept])


def remembered_words(words: Words, merges_M2: Ints) -> dict[str, torch.Tensor]:
    """Return the words after these merges as a node's memory."""
    arrays = {"symbols": words.symbols_S, "counts": words.counts_W, "documents": words.documents_WD}
    return {name: torch.from_numpy(value) for name, value in {**arrays, "merges": merges_M2}.items()}


def recalled(memory: Tensors, merges_M2: Ints) -> tuple[Words, int] | None:
    """Return the words in a memory and how many merges they have seen, if those are the first of these merges."""
    if "merges" not in memory:
        return None
    before = memory["merges"].numpy()
    if len(before) > len(merges_M2) or not np.array_equal(before, merges_M2[: len(before)]):
        return None
    return Words(*(memory[name].numpy() for name in ("symbols", "counts", "documents"))), len(before)
