"""Token by token: what a model makes of a given text, and what it writes, each token with its log-probability."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from queue import SimpleQueue
from threading import Event, Thread
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.evaluation.generate import write
from fedllm.silo.objective import takes_logits_to_keep

VALUES = 1 << 26
"""Logits that are held at a time: 256 MB in float32."""


class Told(NamedTuple):
    """A token, its log-probability in nats (None for the first of a text) and the likeliest ones in its place."""

    token: int
    logprob: float | None
    top: tuple[tuple[int, float], ...] = ()


def read_tokens(model: nn.Module, rows: Sequence[list[int]], top: int, vocabulary: int) -> list[list[Told]]:
    """Return every row's tokens with their log-probabilities after what stands before them.

    Rows of like length are batched, so that at most `VALUES` logits are held; a row alone may have more.
    """
    order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
    found: list[list[Told]] = [[] for _ in rows]
    while order:
        width = len(rows[order[0]])
        size = max(1, VALUES // (width * vocabulary))
        places, order = order[:size], order[size:]
        for place, told in zip(places, read_batch(model, [rows[place] for place in places], top), strict=True):
            found[place] = told
    return found


def read_batch(model: Any, rows: Sequence[list[int]], top: int) -> list[list[Told]]:
    """Return the same for rows of one batch."""
    width, device = max(map(len, rows)), next(model.parameters()).device
    # Padded on the right: a causal model does not look there.
    ids_BT = torch.tensor([row + [0] * (width - len(row)) for row in rows], device=device)
    kwargs = {"logits_to_keep": width} if takes_logits_to_keep(model) else {}
    model.eval()
    told = []
    with torch.no_grad():
        logits_BTV = model(input_ids=ids_BT, use_cache=False, **kwargs).logits[:, -width:]
        for row, logits_TV in zip(rows, logits_BTV, strict=True):
            logprobs_TV = logits_TV[: len(row) - 1].float().log_softmax(-1)
            told.append([Told(row[0], None), *after(logprobs_TV, row[1:], top)] if row else [])
    return told


def after(logprobs_TV: Tensor, tokens: Sequence[int], top: int) -> list[Told]:
    """Return tokens with their log-probabilities, and the `top` likeliest beside each."""
    own_T = logprobs_TV.gather(1, torch.tensor(tokens, dtype=torch.int64, device=logprobs_TV.device)[:, None])[:, 0]
    values_TK, best_TK = logprobs_TV.topk(min(top, logprobs_TV.shape[-1]), -1)
    likeliest = [
        tuple(zip(ids, values, strict=True)) for ids, values in zip(best_TK.tolist(), values_TK.tolist(), strict=True)
    ]
    return [Told(*each) for each in zip(tokens, own_T.tolist(), likeliest, strict=True)]


def written_tokens(model: nn.Module, ids: list[int], settings: Any, seed: int, top: int) -> Iterator[Told]:
    """Yield the tokens that a model writes after these, as it writes them; closing the iterator stops it.

    Log-probabilities are the model's own, before temperature and top_p.
    """
    from transformers import LogitsProcessorList, StoppingCriteriaList

    tokens: SimpleQueue[Told | Exception | None] = SimpleQueue()
    stopped, last = Event(), list[Tensor]()

    def look(so_far: Tensor, scores_BV: Tensor) -> Tensor:
        last[:] = [scores_BV.float().log_softmax(-1)]
        return scores_BV

    def hear(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
        tokens.put(after(last[0], so_far[:1, -1].tolist(), top)[0])
        return torch.full((len(so_far),), stopped.is_set(), device=so_far.device)

    def work() -> None:
        own: dict[str, Any] = {
            "logits_processor": LogitsProcessorList([look]),
            "stopping_criteria": StoppingCriteriaList([hear]),
        }
        try:
            write(model, [ids], settings, seed, **own)
            tokens.put(None)
        except Exception as error:  # whatever it is, it belongs to the one who reads
            tokens.put(error)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        while (told := tokens.get()) is not None:
            if isinstance(told, Exception):
                raise told
            yield told
    finally:
        stopped.set()
        thread.join()
