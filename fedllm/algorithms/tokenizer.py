"""A byte-level BPE tokenizer that silos learn together: they send counts of neighbouring symbols, never text.

Sennrich et al. 2016 (arXiv:1508.07909), algorithm 1, on the sum of the silos' counts, with many merges a round: those
whose count is at least `share` of the most frequent pair's and of which no two can meet in a word. One merge a round
would give the pooled tokenizer itself; the tokens that a text takes differ from its by a few parts in ten thousand.

What leaves a silo are pairs of tokens and their counts. A pair can spell a word, and a rare word can be a name, so a
silo says only pairs that it has `min_count` times in `min_documents` rows or more, and a pair becomes a token, which
all silos see, only where `min_silos` of them said it. The server learns each silo's counts of what it is told; as it
chooses the merges, a server that cheats can ask for the counts of any word that passes those limits.

A silo whose language no other one shares, such as code among prose, gets few tokens of its own with two silos; one silo
and twenty rows (`min_silos = 1`, `min_documents = 20`) keep rare words back too.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Algorithm, Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.silo.token_client import Settings, tell_pairs
from fedllm.silo.token_counts import BYTES, Ints, Pairs
from fedllm.silo.token_files import SPECIAL

LARGEST_COUNT = 2.0**40
"""More than a silo has of any pair; sums of that many are still exact."""


def byte_pairs(
    select: Select,
    *,
    vocab: int = 8000,
    share: float = 0.5,
    pairs: int = 4096,
    min_count: float = 5,
    min_documents: int | None = None,
    min_silos: int = 2,
    contribution: float | None = None,
    noise: float = 0.0,
) -> Algorithm:
    """Learn `vocab` tokens: three special ones, 256 bytes, and merges; each call of `server` is one round of merges.

    A silo's data are texts, one a document; a reply has at most `pairs` pairs. `min_documents` is 2 unless said.
    `contribution` bounds the L2 norm of what one document adds to a round's counts, and `noise` is the standard
    deviation of the Gaussian noise on every count as a multiple of it: to the documents of a silo each round is one
    release of the Gaussian mechanism with sensitivity `contribution`; the report counts the `releases`. No epsilon is
    reckoned here. With noise `min_documents` has to be 1, since it looks at exact counts.
    """
    documents = min_documents if min_documents is not None else (1 if noise else 2)
    settings = Settings(
        vocab - BYTES - len(SPECIAL), share, pairs, min_count, documents, min_silos, contribution, noise
    )
    require_sense(settings, vocab)

    def init(params: Tensors) -> State:
        return State(0, {"merges": params.get("merges", torch.zeros(0, 2, dtype=kind_of(vocab)))}, {}, {})

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        return tell_pairs(request, silo, settings)

    def server(state: State, exchange: Exchange) -> tuple[State, Report]:
        merges_M2, asked = state.params["merges"], list(select(state.round))
        if len(asked) < min_silos:
            raise FedllmError(
                f"tokenizer.min_silos is {min_silos}, but a round asks {len(asked)} silos; lower it or ask more."
            )
        waiting, told, report = set(asked), list[Pairs](), dict[str, float | str]()
        for reply in exchange([Request(name, state.round, "pairs", {"merges": merges_M2}) for name in asked]):
            try:
                told.append(read_pairs(reply, state.round, waiting, BYTES + len(merges_M2), settings))
            except Refused as problem:
                report[f"dropped.{reply.client}"] = str(problem)
                continue
            waiting.discard(reply.client)
        for name in sorted(waiting - {key.removeprefix("dropped.") for key in report}):
            report[f"dropped.{name}"] = "no reply"
        if not told:
            raise FedllmError("No silo gave counts for the tokenizer; see in the report why each was dropped.")
        new = chosen(told, merges_M2.numpy(), settings)
        room = settings.merges - len(merges_M2) - len(new)
        report |= {"clients": len(told), "asked": len(asked), "new_tokens": len(new), "room": room}
        if noise:
            report |= {"releases": state.round + 1, "noise_multiplier": noise, "sensitivity": contribution or 0.0}
        grown = torch.cat([merges_M2, torch.tensor(new, dtype=merges_M2.dtype).view(-1, 2)])
        return State(state.round + 1, {"merges": grown}, {}, {}), report

    steps = [
        Step("server", "send the merges so far"),
        Step("silo", f"count pairs of tokens (at least {min_count:g} times in {documents} documents)"),
        *([Step("silo", f"noise: {noise:g} x {contribution:g}")] if noise and contribution else []),
        Step("server", f"merge what {min_silos} silos have, down to {share:g} of the most frequent"),
    ]
    return Algorithm(init, client, server, None, steps, lambda like: reply_like(settings, kind_of(vocab)))


def learn(algorithm: Algorithm, exchange: Exchange, state: State | None = None) -> tuple[State, list[Report]]:
    """Run rounds until the vocabulary is full, or no pair is left that enough silos have often enough."""
    state, reports = state or algorithm.init({}), list[Report]()
    while not reports or (reports[-1]["new_tokens"] and reports[-1]["room"]):
        state, report = algorithm.server(state, exchange)
        reports.append(report)
    return state, reports


def read_pairs(reply: Reply, round_number: int, waiting: set[str], symbols: int, settings: Settings) -> Pairs:
    """Return the pairs in a reply, or raise `Refused`; nothing in a reply is trusted."""
    if reply.client not in waiting:
        raise Refused("it was not asked, or has answered already")
    if reply.round != round_number:
        raise Refused(f"it answers round {reply.round}, not {round_number}")
    if reply.tensors.keys() != {"pairs", "counts"}:
        raise Refused(f"wrong names: {sorted(reply.tensors)[:3]} instead of pairs and counts")
    sides, counts = reply.tensors["pairs"], reply.tensors["counts"]
    if sides.dtype not in (torch.int16, torch.int32) or counts.dtype != torch.float32:
        raise Refused(f"its pairs and counts are {sides.dtype} and {counts.dtype}")
    if counts.dim() != 1 or sides.shape != (len(counts), 2) or len(counts) > settings.pairs:
        raise Refused(f"its pairs and counts have shapes {tuple(sides.shape)} and {tuple(counts.shape)}")
    left, right = sides.numpy().astype(np.int64).T
    keys_P, counts_P = left << 32 | right, counts.numpy().astype(np.float64)
    if len(keys_P) and (min(left.min(), right.min()) < 0 or max(left.max(), right.max()) >= symbols):
        raise Refused(f"it names a symbol outside of the {symbols} that there are")
    if (np.diff(keys_P) <= 0).any():
        raise Refused("its pairs do not rise")
    if not ((counts_P >= settings.min_count - 0.5) & (counts_P <= LARGEST_COUNT)).all():
        raise Refused(f"a count is below {settings.min_count:g}, not finite or beyond reason")
    return Pairs(keys_P, np.round(counts_P))


def chosen(told: Sequence[Pairs], merges_M2: Ints, settings: Settings) -> list[tuple[int, int]]:
    """Return the next merges, the most frequent first: they cannot meet, and each makes a token that is new.

    Counts are whole numbers and ties go to the lower symbols, so the order of arrival leaves no trace.
    """
    keys_P, place, silos_P = np.unique(
        np.concatenate([pairs.keys_P for pairs in told]), return_inverse=True, return_counts=True
    )
    counts_P = np.bincount(place, weights=np.concatenate([pairs.counts_P for pairs in told]))
    shared_P = np.flatnonzero(silos_P >= settings.min_silos)
    order_P = shared_P[np.lexsort((keys_P[shared_P], -counts_P[shared_P]))]
    spelled = spellings(merges_M2.tolist())
    known, lefts, rights, new = set(spelled), set[int](), set[int](), list[tuple[int, int]]()
    least = 0.0
    for key, count in zip(keys_P[order_P].tolist(), counts_P[order_P].tolist(), strict=True):
        left, right = key >> 32, key & 0xFFFFFFFF
        token = spelled[left] + spelled[right]
        if token in known:
            continue
        least = least or settings.share * count
        if count < least or len(merges_M2) + len(new) == settings.merges:
            break
        if left in rights or right in lefts:
            continue
        new.append((left, right))
        known.add(token)
        lefts.add(left)
        rights.add(right)
    return new


def spellings(merges: Sequence[Sequence[int]]) -> list[bytes]:
    """Return the bytes of every symbol.

    >>> spellings([[116, 104], [256, 101]])[256:]
    [b'th', b'the']
    """
    spelled = [bytes([value]) for value in range(BYTES)]
    for left, right in merges:
        spelled.append(spelled[left] + spelled[right])
    return spelled


def require_sense(settings: Settings, vocab: int) -> None:
    """Raise for settings that cannot be meant."""
    if settings.merges < 0:
        raise FedllmError(f"tokenizer.vocab is {vocab}; it must be at least {BYTES + len(SPECIAL)}.")
    if not 0 < settings.share <= 1:
        raise FedllmError(f"tokenizer.share is {settings.share}; it must be above 0 and at most 1.")
    for key in ("pairs", "min_count", "min_documents", "min_silos"):
        if getattr(settings, key) < 1:
            raise FedllmError(f"tokenizer.{key} is {getattr(settings, key)}; it must be at least 1.")
    if settings.noise < 0 or (settings.contribution is not None and settings.contribution <= 0):
        raise FedllmError("tokenizer.noise and tokenizer.contribution are below 0; give numbers above 0.")
    if settings.noise and settings.contribution is None:
        raise FedllmError(
            "tokenizer.noise is set without tokenizer.contribution: noise hides nothing unless what a document adds is "
            "bounded; set it, such as to 100."
        )
    if settings.noise and settings.min_documents > 1:
        raise FedllmError("tokenizer.min_documents looks at exact counts, which noise is to hide; set it to 1.")


def kind_of(vocab: int) -> torch.dtype:
    """Return the smallest type of the symbols that travels."""
    return torch.int16 if vocab <= torch.iinfo(torch.int16).max else torch.int32


def reply_like(settings: Settings, kind: torch.dtype) -> Tensors:
    """Return the largest reply, on the meta device."""
    return {
        "pairs": torch.empty(settings.pairs, 2, dtype=kind, device="meta"),
        "counts": torch.empty(settings.pairs, dtype=torch.float32, device="meta"),
    }
