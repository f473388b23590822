"""What a client answers to `evaluate`: the loss on the text that its silo held out."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import torch

from fedllm.core.types import NOTHING, Client, Reply, Request, Silo, Tensors
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.keeping import own_of
from fedllm.silo.objective import Objective
from fedllm.silo.reading import can_go_on
from fedllm.silo.scoring import calibrated, largest, log_likelihoods, neutral_shares, scored_tokens, word_shares
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
    first: Tensors = NOTHING,
) -> Client:
    """Evaluate the request's tensors on the silo's held-out text, with what the silo keeps of its own.

    What neither carries is as in `first`. With the scalar `base` it is the model as it was before training, with
    `shared` the silo's own is left out. The reply has `loss` (nats a scored token), `scored` (tokens) and, for a
    classification with words, `accuracy` and `calibrated`, the accuracy after contextual calibration (Zhao et al.
    2021, arXiv:2102.09690, section 5). Its weight is the scored tokens; where nothing can be scored there is no
    `loss`. `autocast` is that of the objective: words are scored without it, so that the text before them is read once.
    """
    words = word_tokens(tokenizer, task)
    neutral = [each_word(example, words) for example in task.neutral] if words else []
    pad_id = tokenizer.pad_token_id

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        if request.tensors:
            own = {} if request.scalars.get("shared") else own_of(silo.memory)
            write(trained(silo.model), {**first, **request.tensors, **own})
        asked = [each_word(example, words) for example in silo.data["test"]]
        every = [*asked, *neutral]
        with trainable.base(silo.model) if request.scalars.get("base") else nullcontext():
            texts = [text_before(each) for each in every]
            if words and all(texts) and can_go_on(silo.model):
                contexts = Contexts(texts, [each.words for each in every])
                found = word_scores(
                    silo.model, contexts, pad_id=pad_id, batch_size=batch_size, autocast=autocast, tick=silo.tick
                )
                sums = [total for totals in found for total in totals]
            else:
                rows = [row for each in every for row in each.rows]
                sums = log_likelihoods(
                    silo.model, rows, objective, pad_id=pad_id, batch_size=batch_size, tick=silo.tick
                )
        scalars = summary(asked, neutral, sums, len(words))
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


def summary(asked: Sequence[Asked], neutral: Sequence[Asked], sums: Sequence[float], words: int) -> dict[str, float]:
    """Return the mean loss a scored token, their number, and how often an example's own word is likeliest.

    `neutral` are the texts that say nothing, scored after those that were `asked`.
    """
    total, scored, place, shares = 0.0, 0, 0, list[list[float]]()
    for each in [*asked, *neutral]:
        here = sums[place : place + len(each.rows)]
        if len(shares) < len(asked):
            total += here[each.true]
            scored += scored_tokens(each.rows[each.true])
        shares.append(word_shares(here, each.words))
        place += len(each.rows)
    scalars = {"scored": float(scored)}
    if scored:
        scalars["loss"] = -total / scored
        known = list(zip(asked, shares, strict=False))
        if words:
            scalars["accuracy"] = sum(largest(share) == each.true for each, share in known) / len(asked)
        if neutral:
            usual = neutral_shares([share[:words] for share in shares[len(asked) :]])
            right = sum(largest(calibrated(share, usual)) == each.true for each, share in known)
            scalars["calibrated"] = right / len(asked)
    return scalars
