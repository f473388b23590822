"""What a silo answers while a tokenizer is learned: its counts of pairs, and how long its held-out text is."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Reply, Request, Silo, Tensors
from fedllm.silo.count_noise import noised, random_of, secret_of
from fedllm.silo.token_counts import (
    BYTES,
    Ints,
    Pairs,
    Words,
    count_pairs,
    count_words,
    merged,
    most,
    recalled,
    remembered_words,
)


class Settings(NamedTuple):
    """How a tokenizer is learned; `algorithms.tokenizer.byte_pairs` says what each means."""

    merges: int
    share: float
    pairs: int
    min_count: float
    min_documents: int
    min_silos: int
    contribution: float | None
    noise: float


def tell_pairs(request: Request, silo: Silo, settings: Settings) -> tuple[Reply, Tensors]:
    """Count the pairs after the request's merges; the words are remembered, so that each round starts at the last."""
    merges_M2 = merges_in(request)
    words = words_after(merges_M2, silo, settings)
    kept: dict[str, torch.Tensor] = remembered_words(words, merges_M2)
    if settings.noise:
        kept["secret"] = secret_of(silo.memory)
        random = random_of(kept["secret"], request.round, merges_M2)
        sigma = settings.noise * (settings.contribution or 0.0)
        exact = count_pairs(words, 0, 1)
        told = noised(exact, BYTES + len(merges_M2), sigma, settings.pairs, random)
        told = Pairs(*(part[told.counts_P >= settings.min_count] for part in told))
    else:
        told = count_pairs(words, settings.min_count, settings.min_documents)
    told = most(told, settings.pairs)
    kind = request.tensors["merges"].dtype
    sides = torch.from_numpy(np.stack([told.keys_P >> 32, told.keys_P & 0xFFFFFFFF], axis=1)).to(kind)
    counts = torch.from_numpy(np.round(told.counts_P)).to(torch.float32)
    return Reply(request.client, request.round, {"pairs": sides, "counts": counts}, 1.0), kept


def merges_in(request: Request) -> Ints:
    """Return the merges of a request, each of symbols that there were: others could join words to each other."""
    merges_M2 = request.tensors["merges"].numpy().astype(np.int64).reshape(-1, 2)
    known_M = BYTES + np.arange(len(merges_M2))
    if (merges_M2 < 0).any() or (merges_M2.max(axis=1, initial=0) >= known_M).any():
        raise FedllmError("The server asks for merges of symbols that there are not; its tokenizer is broken.")
    return merges_M2


def words_after(merges_M2: Ints, silo: Silo, settings: Settings) -> Words:
    """Return the silo's words after these merges, from its memory where that fits."""
    before = recalled(silo.memory, merges_M2)
    if before is None:
        texts = silo.data["train"]
        if len(texts) < settings.min_documents:
            raise FedllmError(
                f"The silo '{silo.name}' has {len(texts)} texts and tokenizer.min_documents is "
                f"{settings.min_documents}; give it more rows, or lower that."
            )
        remembered = settings.min_documents if settings.min_documents > 1 else 0
        before = count_words(texts, settings.contribution, remembered), 0
    return merged(before[0], merges_M2, before[1])
