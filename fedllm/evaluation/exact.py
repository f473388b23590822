"""Exact match: the model writes its answer, and the answer found in it is compared with the right one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from typing import Any

from torch import nn

from fedllm.core.errors import FedllmError
from fedllm.core.types import ignore
from fedllm.evaluation.choice import Result, result
from fedllm.evaluation.generate import complete
from fedllm.silo.answers import matches
from fedllm.silo.templates import Turn


def exact_match(
    model: nn.Module,
    tokenizer: Any,
    rows: Sequence[Mapping[str, Any]],
    *,
    max_new_tokens: int = 256,
    limit: int | None = None,
    batch_size: int = 16,
    where: str = "the questions",
    tick: Callable[[int], None] = ignore,
) -> Result:
    """Answer the first `limit` rows of `prompt` and `answer` greedily, each as a conversation of its own.

    `where` names the rows in errors; `tick` is told the tokens that were written.
    """
    chosen = list(islice(rows, limit))
    for number, row in enumerate(chosen, 1):
        for column in ("prompt", "answer"):
            if column not in row:
                found = ", ".join(sorted(row)) or "none"
                message = f"no column '{column}' among {found}; rename yours to it."
                raise FedllmError(f"{where}, row {number}: {message}")
    asked = [[Turn("user", str(row["prompt"]))] for row in chosen]
    written = complete(model, tokenizer, asked, max_new_tokens=max_new_tokens, batch_size=batch_size, tick=tick)
    return result([matches(text, str(row["answer"])) for text, row in zip(written, chosen, strict=True)])
