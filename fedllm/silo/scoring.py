"""How likely a model finds given continuations: log-likelihood scoring, in batches of like length."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple

import torch
from torch import nn

from fedllm.core.errors import FedllmError
from fedllm.core.types import ignore
from fedllm.silo.examples import Example, collate
from fedllm.silo.objective import Objective
from fedllm.silo.tasks import tokenise


class Continuation(NamedTuple):
    """A text and what may follow it as one example, of which only what follows is scored."""

    example: Example
    characters: int


class Scored(NamedTuple):
    """The summed log-probability of a continuation in nats, and how long it is."""

    total: float
    tokens: int
    characters: int


def continuation(tokenizer: Any, before: str, after: str) -> Continuation:
    """Tokenise `before + after` as one text; the space that joins them is no character of `after`.

    A token across the seam is scored, so that a choice of any number of tokens is scored whole.
    """
    if not before:
        # The first token of a row cannot be scored: something must stand before it.
        before = tokenizer.bos_token or tokenizer.eos_token or ""
    example = tokenise(tokenizer, [(before, False), (after, True)], sys.maxsize)
    if example is None:
        raise FedllmError(f"The choice '{after}' cannot be scored after '{before[-40:]}'; give it some text.")
    return Continuation(example, len(after.removeprefix(" ")))


def score_continuations(
    model: nn.Module,
    continuations: Sequence[Continuation],
    objective: Objective,
    *,
    pad_id: int,
    batch_size: int = 16,
    tick: Callable[[int], None] = ignore,
) -> list[Scored]:
    """Score continuations, in their order; `tick` is told the tokens of every batch."""
    examples = [each.example for each in continuations]
    sums = log_likelihoods(model, examples, objective, pad_id=pad_id, batch_size=batch_size, tick=tick)
    return [
        Scored(total, scored_tokens(each.example), each.characters)
        for total, each in zip(sums, continuations, strict=True)
    ]


def log_likelihoods(
    model: nn.Module,
    examples: Sequence[Example],
    objective: Objective,
    *,
    pad_id: int,
    batch_size: int = 16,
    tick: Callable[[int], None] = ignore,
) -> list[float]:
    """Return the summed log-probability of each example's scored tokens, in nats."""
    device = next(model.parameters()).device
    # Longest first: what does not fit into memory shows at once.
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    sums = [0.0] * len(examples)
    model.eval()
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        rows = [examples[place] for place in places]
        with torch.no_grad():
            loss_B = objective(model, collate(rows, pad_id, device))
        for place, loss in zip(places, loss_B.tolist(), strict=True):
            sums[place] = -loss
        tick(sum(len(row.input_ids) for row in rows))
    return sums


def scored_tokens(example: Example) -> int:
    """Return how many tokens of an example are scored; the first has nothing before it."""
    return sum(label >= 0 for label in example.labels[1:])


def choose(scored: Sequence[Scored], by: Literal["character", "sum"] = "character") -> int:
    """Return the place of the best choice, the first of equals.

    `character` divides the log-likelihood by the choice's characters, which is `acc_norm` of
    lm-evaluation-harness; `sum` takes it as it is, which is `acc` and favours short choices.

    >>> scored = [Scored(-2.0, 1, 2), Scored(-3.0, 2, 9)]
    >>> choose(scored), choose(scored, "sum")
    (1, 0)
    """
    values = [each.total / (max(1, each.characters) if by == "character" else 1) for each in scored]
    return max(range(len(values)), key=values.__getitem__)


def choose_word(totals: Sequence[float], words: Sequence[Sequence[int] | Sequence[str]]) -> int:
    """Return the place of the likeliest of several words given as their pieces, the first of equals.

    >>> choose_word([-0.10, -0.12], [(5,), (5, 6)]), choose_word([-0.10, -3.0], [(5,), (5, 6)])
    (1, 0)
    """
    return largest(word_shares(totals, words))


def word_shares(totals: Sequence[float], words: Sequence[Sequence[int] | Sequence[str]]) -> list[float]:
    """Return each word's share of the probability that the model says one of them, from their log-likelihoods.

    It is the plain sum: the probability that the model says just this word. A word that begins other
    words (`card`, `card payment`) would then always beat them, so it counts for what is left of
    its probability once theirs is taken away. No length normalisation, which would favour long words.
    """
    top = max(totals)
    left = [math.exp(total - top) for total in totals]
    for longer, word in enumerate(words):
        starts = [at for at, other in enumerate(words) if other != word and word[: len(other)] == other]
        if starts:
            # Only from the longest of them: the shorter ones lose that one's whole probability.
            left[max(starts, key=lambda at: len(words[at]))] -= math.exp(totals[longer] - top)
    whole = sum(max(0.0, share) for share in left)
    return [share / whole for share in left]


def neutral_shares(each: Sequence[Sequence[float]]) -> list[float]:
    """Return the mean share of each word over texts that say nothing: p_cf of Zhao et al. 2021 (arXiv:2102.09690)."""
    return [sum(shares) / len(each) for shares in zip(*each, strict=True)]


def calibrated(shares: Sequence[float], usual: Sequence[float]) -> list[float]:
    """Return diag(p_cf)^-1 p, their equation 1 with section 5's W: what a word gets beyond what it gets anyway.

    A share without a usual one, since a row cuts its word in its own way, is taken against the mean.

    >>> calibrated([0.6, 0.4], [0.9, 0.1])
    [0.6666666666666666, 4.0]
    """
    least = 1e-12
    mean = sum(usual) / len(usual)
    return [share / max(usual[place] if place < len(usual) else mean, least) for place, share in enumerate(shares)]


def largest(values: Sequence[float]) -> int:
    """Return the place of the largest value, the first of equals."""
    return max(range(len(values)), key=values.__getitem__)
