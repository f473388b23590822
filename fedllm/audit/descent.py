"""A text out of an update by gradient matching: embeddings are sought whose gradient is the update.

DLG (Zhu et al. 2019, arXiv:1906.08935) lets input embeddings go down the distance between their gradient and the one
that was seen. LAMP (Balunovic et al. 2022, arXiv:2202.08827) adds a term that keeps their lengths those of tokens
(equation 5), begins at the best of many random texts, and takes turns with moves of whole tokens (`audit/moves.py`);
in the end each place is given the token nearest to it by cosine. The loss and the labels are in `audit/matching.py`.

It differs from the paper in that labels are not known, that it chooses among the candidates that cheaper attacks name
first, that the model under attack is its own language model, with a weight that sinks to 0, and that a token may be put
in another's place. Unlike the span check it also finds the last token, which is a label, and it asks for nothing but a
gradient: it can be tried on LoRA whose B is 0, on signs, on the sum of several steps (taken for one), and on noise.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn

from fedllm.audit.matching import Seen, cosines, gradients, mismatch, offers, seen, shares, supposed, table
from fedllm.audit.moves import rearranged
from fedllm.core.types import Tensors

HOT, COLD = 0.3, 0.05
"""Heat of the shares at the first step and at the last; at the end a place belongs to one token."""

RATE = 0.05
"""Adam's, over the size of the embeddings' values."""

LENGTHS = 0.1
"""What the lengths' term counts, in squared mean lengths of tokens."""


LIKELY = 0.1
"""What a nat a token by the language model counts beside the mismatch at first; at the end it counts nothing."""

OFFERED = 64
"""Replacements that are drawn from in a turn."""


class Effort(NamedTuple):
    """How long to try: `steps` in all, in so many `turns`, each followed by `rounds` of moves; from several starts."""

    steps: int = 48
    turns: int = 8
    rounds: int = 10
    drawn: int = 32
    """Random texts, of which the best is where a start begins."""
    starts: int = 1


USUAL = Effort()


def descend(
    model: nn.Module,
    update: Tensors,
    candidates: Sequence[int],
    scored: Sequence[bool],
    seed: int,
    effort: Effort = USUAL,
) -> list[int] | None:
    """Return the text, as long as `scored`, whose gradient is nearest to an update; None where that says nothing.

    `candidates` are tokens from the likeliest on; `scored` says which places are labels.
    """
    at = seen(model, update, candidates, scored)
    if at is None:
        return None
    draw = random.Random(seed)
    ended = [one_start(at, effort, draw) for _ in range(effort.starts)]
    places = min(ended, key=lambda each: each[0])[1]
    return at.tokens_C[list(places)].tolist()


def one_start(at: Seen, effort: Effort, draw: random.Random) -> tuple[float, Sequence[int]]:
    """Return the best text that one start comes to, as places among the candidates, with its mismatch."""
    table_CI, length = table(at), len(at.scored_T)
    # The likeliest candidates first: a random text has as many of them as it has room for.
    texts = [draw.sample([place % len(table_CI) for place in range(length)], length) for _ in range(effort.drawn)]
    scores = judge(at, LIKELY)(texts)
    places: Sequence[int] = texts[scores.index(min(scores))]
    x_TI, each = table_CI[list(places)], max(1, effort.steps // effort.turns)
    for turn in range(effort.turns):
        # Far from the text matching says little of order, and the language model more; near to it all is said.
        score = judge(at, LIKELY * (1 - (turn + 1) / effort.turns))
        x_TI = descended(at, x_TI, table_CI, turn * each, each, effort.steps)
        nearest: Sequence[int] = cosines(x_TI, table_CI).argmax(-1).tolist()
        there, here = score([nearest, places])
        if there > here:
            nearest, x_TI = places, table_CI[list(places)]
        found = rearranged(nearest, offers(at, nearest, OFFERED), score, effort.rounds, draw)
        places = found.tokens
        came = [table_CI[token] if old is None else x_TI[old] for token, old in zip(places, found.came, strict=True)]
        x_TI = torch.stack(came)
    return supposed(at, [places])[0][0], places


def judge(at: Seen, likely: float) -> Callable[[Sequence[Sequence[int]]], list[float]]:
    """Return what texts are judged by: their mismatch, and so much of a nat by the language model."""
    return lambda texts: [apart + likely * loss for apart, loss in supposed(at, texts)]


def descended(at: Seen, x_TI: Tensor, table_CI: Tensor, first: int, steps: int, whole: int) -> Tensor:
    """Return embeddings after so many of a `whole` of steps down the mismatch and away from odd lengths."""
    x_TI = x_TI.clone().requires_grad_()
    usual = table_CI.norm(dim=-1).mean()
    adam = torch.optim.Adam([x_TI], lr=RATE * float(table_CI.square().mean().sqrt()))
    for step in range(first, first + steps):
        heat = HOT * (COLD / HOT) ** (step / whole)
        for group in adam.param_groups:
            group["lr"] = RATE * float(table_CI.square().mean().sqrt()) * (1 - step / whole)
        made = gradients(at, x_TI, shares(x_TI, table_CI, heat))
        odd = (x_TI.norm(dim=-1).mean() / usual - 1).square()
        (x_TI.grad,) = torch.autograd.grad(mismatch(at, made, smooth=True) + LENGTHS * odd, x_TI)
        adam.step()
    return x_TI.detach()
