"""What a client answers to `evaluate`: the loss on the text that its silo held out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from fedllm.core.types import Client, Reply, Request, Silo, Tensors
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import Objective
from fedllm.silo.reading import can_go_on
from fedllm.silo.scoring import choose_word, log_likelihoods, scored_tokens
from fedllm.silo.tasks import Task, word_tokens
from fedllm.silo.trainables import Trainable, trained, write
from fedllm.silo.words import Contexts, word_scores


class Asked(NamedTuple):
    """An example once with each of the words that could end it; `true` is the place of its own."""

    rows: list[Example]
    words: list[tuple[int, ...]]
    true: int


def held_out(
    objective: Objective,
    task: Task,
    tokenizer: Any,
    trainable: Trainable,
    *,
    batch_size: int = 16,
    autocast: torch.dtype | None = None,
) -> Client:
    """Evaluate the request's tensors on the silo's held-out text.

    With the scalar `base` it is the model as it was before training. The reply has `loss` (nats a
    scored token), `scored` (tokens) and, for a classification with words, `accuracy`. Its weight is
    the scored tokens; where nothing can be scored there is no `loss`. `autocast` is that of the objective: words are
    scored without it, so that the text before them is read once.
    """
    words = word_tokens(tokenizer, task)
    pad_id = tokenizer.pad_token_id

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        if request.tensors:
            write(trained(silo.model), request.tensors)
        asked = [each_word(example, words) for example in silo.data["test"]]
        with trainable.base(silo.model) if request.scalars.get("base") else nullcontext():
            texts = [text_before(each) for each in asked]
            if words and all(texts) and can_go_on(silo.model):
                contexts = Contexts(texts, [each.words for each in asked])
                found = word_scores(
                    silo.model, contexts, pad_id=pad_id, batch_size=batch_size, autocast=autocast, tick=silo.tick
                )
                sums = [total for totals in found for total in totals]
            else:
                rows = [row for each in asked for row in each.rows]
                sums = log_likelihoods(
                    silo.model, rows, objective, pad_id=pad_id, batch_size=batch_size, tick=silo.tick
                )
        scalars = summary(asked, sums, with_accuracy=bool(words))
        reply = Reply(request.client, request.round, {}, max(1.0, scalars["scored"]), scalars)
        return reply, silo.memory

    return client


def text_before(asked: Asked) -> list[int]:
    """Return the tokens that stand before the words."""
    return asked.rows[0].input_ids[: len(asked.rows[0].input_ids) - len(asked.words[0])]


def each_word(example: Example, words: Sequence[tuple[int, ...]]) -> Asked:
    """Put each of the words in the place of the example's own; without words it stands alone."""
    own = tuple(label for label in example.labels if label != IGNORED)
    if not words:
        return Asked([example], [own], 0)
    # Where the text before it changed how its word is cut, the example's own way joins the others.
    known = list(words) if own in words else [*words, own]
    before = example.input_ids[: len(example.input_ids) - len(own)]
    rows = [Example([*before, *word], [IGNORED] * len(before) + list(word)) for word in known]
    return Asked(rows, known, known.index(own))


def summary(asked: Sequence[Asked], sums: Sequence[float], with_accuracy: bool) -> dict[str, float]:
    """Return the mean loss a scored token, their number, and how often an example's own word is likeliest."""
    total, scored, right, first = 0.0, 0, 0, 0
    for each in asked:
        here = sums[first : first + len(each.rows)]
        first += len(each.rows)
        total += here[each.true]
        scored += scored_tokens(each.rows[each.true])
        right += choose_word(here, each.words) == each.true
    scalars = {"scored": float(scored)}
    if scored:
        scalars["loss"] = -total / scored
        if with_accuracy:
            scalars["accuracy"] = right / len(asked)
    return scalars
