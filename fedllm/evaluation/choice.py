"""Multiple choice: the answer is the choice with the highest log-likelihood for its length."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any, NamedTuple

from torch import nn

from fedllm.core.errors import FedllmError
from fedllm.core.types import ignore
from fedllm.silo.objective import Objective
from fedllm.silo.scoring import choose, continuation, score_continuations
from fedllm.silo.templates import first_token

Row = Mapping[str, Any]

FORMAT = "Question: {question}\nAnswer:"


class Result(NamedTuple):
    """The share of `n` answers that are right, and that share's standard error."""

    accuracy: float
    n: int
    error: float


def result(right: Sequence[bool]) -> Result:
    """Count the right answers.

    >>> result([True, True, False, False, False])
    Result(accuracy=0.4, n=5, error=0.2449489742783178)
    """
    if not right:
        raise FedllmError("The evaluation has no questions; give it a file with at least one row.")
    share = sum(right) / len(right)
    return Result(share, len(right), math.sqrt(share * (1 - share) / max(1, len(right) - 1)))


def multiple_choice(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Row],
    objective: Objective,
    *,
    limit: int | None = None,
    batch_size: int = 16,
    where: str = "the questions",
    tick: Callable[[int], None] = ignore,
) -> Result:
    """Answer rows of `question`, `choices` and `answer`, which is the place of the right choice from 0.

    With `limit` only that many are asked. As in lm-evaluation-harness: no examples before the
    question, no chat template, and each choice's log-likelihood divided by its characters
    (`acc_norm`). `where` names the rows in errors.
    """
    chosen = list(islice(rows, limit))
    for number, row in enumerate(chosen, 1):
        check(row, f"{where}, row {number}")
    asked = [
        continuation(tokenizer, first_token(tokenizer) + FORMAT.format(question=row["question"]), f" {choice}")
        for row in chosen
        for choice in row["choices"]
    ]
    scored = score_continuations(
        model, asked, objective, pad_id=tokenizer.pad_token_id, batch_size=batch_size, tick=tick
    )
    right, first = list[bool](), 0
    for row in chosen:
        last = first + len(row["choices"])
        right.append(choose(scored[first:last]) == row["answer"])
        first = last
    return result(right)


def check(row: Row, where: str) -> None:
    """Refuse a row that is not a question with choices and the place of the right one."""
    for column in ("question", "choices", "answer"):
        if column not in row:
            found = ", ".join(sorted(row)) or "none"
            raise FedllmError(f"{where}: no column '{column}' among {found}; rename yours to it.")
    choices, answer = row["choices"], row["answer"]
    if isinstance(choices, str) or len(choices) < 2 or not all(str(choice).strip() for choice in choices):
        raise FedllmError(f"{where}: 'choices' is {choices!r}; give two texts or more, none of them empty.")
    if isinstance(answer, bool) or not isinstance(answer, int) or not 0 <= answer < len(choices):
        raise FedllmError(f"{where}: 'answer' is {answer!r}; give a place from 0 to {len(choices) - 1}.")
