"""How likely a model finds each of several words after a text, without reading the text once for each of them.

All words share the text before them, so it is read once; the first tokens of all words are then one look at its last
logits, and only what a word has beyond its first token is read on, from the text's keys and values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedllm.core.types import ignore
from fedllm.silo.examples import IGNORED, Example, collate
from fedllm.silo.reading import Read, read

STEMS = 4
"""Rows of words that are read at a time for each row of text: they are short."""


class Contexts(NamedTuple):
    """Texts after which words are scored; each has the number of the row that was read `before` it."""

    tokens: Sequence[Sequence[int]]
    words: Sequence[Sequence[tuple[int, ...]]]
    """Each text's words, as tokens."""
    before: Sequence[int] = ()


def word_scores(
    model: nn.Module,
    contexts: Contexts,
    *,
    pad_id: int,
    before: Read | None = None,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
    tick: Callable[[int], None] = ignore,
) -> list[list[float]]:
    """Return the summed log-probability (nats) of each word of each text, in their order.

    The same as scoring every text with every word behind it as a row of its own. `tick` is told the tokens of every
    batch.
    """
    scores: list[list[float]] = [[] for _ in contexts.tokens]
    # Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(scores)), key=lambda place: -len(contexts.tokens[place]))
    device = next(model.parameters()).device
    model.eval()
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        rows = [contexts.tokens[place] for place in places]
        earlier = before.rows([contexts.before[place] for place in places]) if before else None
        keep = min(map(len, rows)) - 1
        with torch.autocast(device.type, autocast, enabled=autocast is not None):
            logits_RTV, done = read(model, rows, earlier, pad_id, keep)
            last_RV = logits_RTV[torch.arange(len(rows)), torch.tensor([len(row) - 1 - keep for row in rows])]
            heads = sorted({word[0] for place in places for word in contexts.words[place]})
            # Only what is asked for is normalised: the vocabulary is wide.
            top_RW = last_RV[:, heads] - last_RV.logsumexp(-1, keepdim=True)
            for place, row in zip(places, top_RW.tolist(), strict=True):
                value = dict(zip(heads, row, strict=True))
                scores[place] = [value[word[0]] for word in contexts.words[place]]
            more = 0
            for number, stem, log_probs_TV in stems(model, contexts, places, done, pad_id, batch_size):
                more += len(stem)
                add_tails(scores[places[number]], contexts.words[places[number]], stem, log_probs_TV)
        tick(sum(map(len, rows)) + more)
    return scores


def stems(
    model: nn.Module, contexts: Contexts, places: Sequence[int], done: Read, pad_id: int, batch_size: int
) -> Iterator[tuple[int, tuple[int, ...], Tensor]]:
    """Read all but the last tokens of the words that have several; yield text, tokens read and log_probs_TV."""
    asked = [(number, stem) for number, place in enumerate(places) for stem in beginnings(contexts.words[place])]
    # Of like length in a batch: padding would cost more than the words themselves.
    asked.sort(key=lambda each: -len(each[1]))
    for first in range(0, len(asked), STEMS * batch_size):
        group = asked[first : first + STEMS * batch_size]
        logits_RTV, _ = read(model, [stem for _, stem in group], done.rows([n for n, _ in group]), pad_id, 0)
        for (number, stem), logits_TV in zip(group, logits_RTV, strict=True):
            yield number, stem, logits_TV[: len(stem)].log_softmax(-1)


def beginnings(words: Sequence[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return what must be read to score the words: all but their last tokens, without what begins another of these.

    >>> beginnings([(1,), (2, 3), (2, 3, 4), (2, 5)])
    [(2, 3)]
    """
    found = list(dict.fromkeys(word[:-1] for word in words if len(word) > 1))
    return [stem for stem in found if not any(other != stem and other[: len(stem)] == stem for other in found)]


def add_tails(
    scores: list[float], words: Sequence[tuple[int, ...]], stem: tuple[int, ...], log_probs_TV: Tensor
) -> None:
    """Add to the scores of the words that the stem stands for what their tokens after the first have."""
    of = beginnings(words)
    for number, word in enumerate(words):
        # A shorter word may begin several stems, and must be counted in one of them only.
        if len(word) > 1 and next(each for each in of if each[: len(word) - 1] == word[:-1]) == stem:
            scores[number] += sum(float(log_probs_TV[at, token]) for at, token in enumerate(word[1:]))


def label_scores(
    model: nn.Module,
    examples: Sequence[Example],
    rows: Sequence[int],
    *,
    pad_id: int,
    before: Read | None,
    batch_size: int = 16,
    tick: Callable[[int], None] = ignore,
) -> list[float]:
    """Return the summed log-probability of each example's scored tokens, read after that row of what was `before`."""
    sums = [0.0] * len(examples)
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    device = next(model.parameters()).device
    model.eval()
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = collate([examples[place] for place in places], pad_id, device)
        scored_T = (batch.labels_BT[:, 1:] != IGNORED).any(0)
        if bool(scored_T.any()):
            keep = int(scored_T.int().argmax())
            texts = [examples[place].input_ids for place in places]
            earlier = before.rows([rows[place] for place in places]) if before else None
            logits_RTV, _ = read(model, texts, earlier, pad_id, keep)
            next_RT = functional.pad(batch.labels_BT[:, keep + 1 :], (0, 1), value=IGNORED)
            nll_RT = functional.cross_entropy(
                logits_RTV.flatten(0, 1), next_RT.flatten(), ignore_index=IGNORED, reduction="none"
            ).view(next_RT.shape)
            for place, nll in zip(places, nll_RT.sum(1).tolist(), strict=True):
                sums[place] = -nll
        tick(sum(len(examples[place].input_ids) for place in places))
    return sums
