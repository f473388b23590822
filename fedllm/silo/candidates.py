"""Score candidate prompts on a silo's own examples: all of them on the same ones, what they share read once.

Only scores leave the silo. Shapes: P candidates, E examples, T prompt tokens, H hidden.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias, TypeVar

import torch
from torch import Tensor, nn

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.core.types import ignore
from fedllm.silo.evaluate import Asked, each_word, text_before
from fedllm.silo.examples import Example
from fedllm.silo.reading import Read, can_go_on, read_vectors
from fedllm.silo.scoring import choose_word, scored_tokens
from fedllm.silo.words import Contexts, label_scores, word_scores

Measure: TypeAlias = Literal["choice", "loss", "accuracy"]
"""What a score is, lower being better: nats of the right word among the words (`choice`), nats of a scored token
(`loss`), or the share of wrong answers (`accuracy`)."""

Value = TypeVar("Value")

WORST = 1e4
"""The score of a candidate whose numbers are not finite."""


class Reader(NamedTuple):
    """A model as scoring needs it."""

    model: nn.Module
    words: Sequence[tuple[int, ...]]
    """The task's label words as tokens; none where it has none."""
    pad_id: int
    batch_size: int
    tick: Callable[[int], None] = ignore


def drawn(examples: Sequence[Value], count: int, seed: int) -> list[Value]:
    """Return `count` of the examples (0: all), at random and the same ones for a seed."""
    order = torch.randperm(len(examples), generator=generator(seed, "scored")).tolist()
    return [examples[place] for place in order[: count or None]]


def require_measure(measure: Measure, words: Sequence[Any]) -> None:
    """Refuse a score that the task does not have."""
    if measure != "loss" and len(words) < 2:
        raise FedllmError(f"algorithm.score is '{measure}', which needs task.words of at least two labels; use 'loss'.")


def require_reading(model: nn.Module) -> None:
    """Refuse a model that cannot keep what it has read."""
    if not can_go_on(model):
        raise FedllmError(
            f"{type(model).__name__} keeps nothing of what it has read; use another model to search with."
        )


def soft_scores(reader: Reader, prompts_PTH: Tensor, examples: Sequence[Example], measure: Measure) -> Tensor:
    """Return the mean score of each soft prompt before the examples, scores_P."""
    reader.model.eval()
    before = read_vectors(reader.model, prompts_PTH)
    return scores_after(reader, before, len(prompts_PTH), examples, measure)


def scores_after(
    reader: Reader, before: Read, candidates: int, examples: Sequence[Example], measure: Measure
) -> Tensor:
    """Return the mean score of each candidate, given what was read of each, on examples that go on from there."""
    rows = [number for number in range(candidates) for _ in examples]
    settings: dict[str, Any] = {"pad_id": reader.pad_id, "before": before, "batch_size": reader.batch_size}
    if reader.words:
        asked = [each_word(example, reader.words) for example in examples]
        contexts = Contexts(
            [text_before(each) for each in asked] * candidates, [each.words for each in asked] * candidates, rows
        )
        totals = word_scores(reader.model, contexts, tick=reader.tick, **settings)
        found = [score_of(each, total, measure) for each, total in zip(asked * candidates, totals, strict=True)]
    else:
        sums = label_scores(reader.model, list(examples) * candidates, rows, tick=reader.tick, **settings)
        found = [
            -one / max(1, scored_tokens(each)) for one, each in zip(sums, list(examples) * candidates, strict=True)
        ]
    mean_P = torch.tensor(found, dtype=torch.float64).view(candidates, -1).mean(1)
    return mean_P.nan_to_num(nan=WORST, posinf=WORST, neginf=WORST).clamp(max=WORST)


def score_of(asked: Asked, totals: Sequence[float], measure: Measure) -> float:
    """Return the score of one answer from the log-probabilities of its words.

    >>> asked = Asked([], [(5,), (6,)], 1)
    >>> round(score_of(asked, [-1.0, -1.0], "choice"), 4), score_of(asked, [-1.0, -2.0], "accuracy")
    (0.6931, 1.0)
    """
    own = totals[asked.true]
    if measure == "choice":
        return math.log(sum(math.exp(min(total - own, 700.0)) for total in totals))
    if measure == "loss":
        return -own / len(asked.words[asked.true])
    return float(choose_word(totals, asked.words) != asked.true)
