"""Rows that are there twice: exactly, nearly, or at another silo too."""

from __future__ import annotations

import hashlib
import hmac
import os
import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.silo.cleaning import Columns, Note, Step, dropping, text_of
from fedllm.silo.sources import Row
from fedllm.silo.spooled import Mapped, picked

WORD = re.compile(r"\w+")

SHORTEST_SALT = 16
"""Characters; what can be guessed does not hide."""


def normalised(text: str) -> str:
    """Return the text in one Unicode form, lower case, with single spaces.

    >>> normalised(" The\\n  CAT ")
    'the cat'
    """
    return " ".join(unicodedata.normalize("NFKC", text).casefold().split())


def exact_duplicates(text: Columns = "text") -> Step:
    """Keep the first of the rows whose texts are equal but for case, spaces and Unicode form."""
    seen: set[bytes] = set()

    def run(rows: Iterable[Row], note: Note) -> Iterator[Row]:
        seen.clear()
        yield from dropping("", reason, {}).run(rows, note)

    def reason(row: Row) -> str | None:
        place = hashlib.blake2b(encoded(normalised(text_of(row, text))), digest_size=16).digest()
        twice = place in seen
        seen.add(place)
        return "dropped" if twice else None

    return Step("exact_duplicates", run, {"text": text})


def near_duplicates(text: Columns = "text", threshold: float = 0.8, words: int = 5, permutations: int = 128) -> Step:
    """Keep the first of the rows whose sets of runs of `words` words have a Jaccard similarity of `threshold` or more.

    Broder 1997, On the resemblance and containment of documents: the share of equal minima under random
    permutations estimates the similarity, with a standard error below 0.5 / sqrt(`permutations`). Candidates come
    from locality-sensitive hashing, so a pair near the threshold may be missed.
    """
    if not 0 < threshold <= 1:
        raise FedllmError(f"cleaning.near_duplicates: threshold is {threshold}; it must be above 0 and at most 1.")

    def run(rows: Iterable[Row], note: Note) -> Iterator[Row]:
        try:
            from datasketch import MinHash, MinHashLSH
        except ModuleNotFoundError as error:
            raise FedllmError(
                "cleaning.near_duplicates needs the package datasketch; run: pip install 'fedllm[pretrain]'"
            ) from error
        index = MinHashLSH(threshold=threshold, num_perm=permutations)
        kept: list[Any] = []
        for row in rows:
            own = MinHash(num_perm=permutations, seed=1)
            own.update_batch(shingles(text_of(row, text), words))
            if any(kept[other].jaccard(own) >= threshold for other in index.query(own)):
                note("dropped")
                continue
            index.insert(len(kept), own)
            kept.append(own)
            yield row

    settings = {"text": text, "threshold": threshold, "words": words, "permutations": permutations}
    return Step("near_duplicates", run, settings)


def shingles(text: str, words: int) -> list[bytes]:
    """Return the different runs of `words` words of a text; all of it where it has fewer.

    >>> sorted(shingles("A rose is a rose", 2))
    [b'a rose', b'is a', b'rose is']
    """
    said = WORD.findall(normalised(text))
    starts = range(max(1, len(said) - words + 1))
    return sorted({encoded(" ".join(said[start : start + words])) for start in starts})


def encoded(text: str) -> bytes:
    """Return the bytes of a text, also of one that is not Unicode."""
    return text.encode("utf-8", "surrogatepass")


def salt_from(variable: str) -> bytes:
    """Return the secret that the silos share and the server does not know, from the node's environment."""
    salt = os.environ.get(variable, "")
    if len(salt) < SHORTEST_SALT:
        raise FedllmError(
            f"The environment variable {variable} has no salt of {SHORTEST_SALT} characters or more; let the silos "
            "agree on a random one, such as from `openssl rand -hex 32`, and keep it from the server."
        )
    return salt.encode()


def fingerprints(texts: Sequence[str], salt: bytes) -> Tensor:
    """Return HMAC-SHA256 of each normalised text, its first 128 bits, as int64 [N, 2] in the order of the texts."""
    digests = b"".join(hmac.digest(salt, encoded(normalised(text)), "sha256")[:16] for text in texts)
    return torch.frombuffer(bytearray(digests), dtype=torch.int64).view(-1, 2) if texts else torch.zeros(0, 2).long()


def without(rows: Sequence[Row], text: Columns, salt: bytes, dropped_N2: Tensor) -> Sequence[Row]:
    """Return the rows whose fingerprints are not among those that are to be dropped."""
    gone = set(map(tuple, dropped_N2.tolist()))
    own = fingerprints(Mapped(rows, lambda row: text_of(row, text)), salt)
    return picked(rows, [place for place, print_2 in enumerate(own.tolist()) if tuple(print_2) not in gone])
