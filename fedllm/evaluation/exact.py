"""Exact match: the model writes its answer, and the answer found in it is compared with the right one."""

from __future__ import annotations

import re
import string
from collections.abc import Callable, Mapping, Sequence
from decimal import Decimal
from itertools import islice
from typing import Any

from torch import nn

from fedllm.core.errors import FedllmError
from fedllm.core.types import ignore
from fedllm.evaluation.choice import Result, result
from fedllm.evaluation.generate import complete
from fedllm.silo.templates import Turn

NUMBER = re.compile(r"(?:(?<!\w)-)?\$?(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|(?<!\w)-?\.\d+")
MARK = "####"
"""What stands before the final answer in GSM8K and those who followed it."""


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


def matches(written: str, answer: str) -> bool:
    """Say whether what was written gives the answer: the same number, or the same words where it is none.

    >>> matches("She pays $1,051.00 in all.", "1051"), matches("5 - 3 = 2\\n#### 2 apples for 4", "2")
    (True, True)
    >>> matches("The Eiffel tower!", "Eiffel Tower"), matches("about 3", "three")
    (True, False)
    """
    gold = answer.partition(MARK)[2] or answer
    wanted = NUMBER.fullmatch(plain_signs(gold).strip())
    if wanted:
        return last_number(written) == value(wanted.group())
    return same_words(written.partition(MARK)[2] or written) == same_words(gold)


def last_number(text: str) -> Decimal | None:
    """Return the first number after `####` if there is one, else the last number of the text.

    >>> last_number("He had 3, then 1,000.50."), last_number("#### -4.0 of 9"), last_number("none")
    (Decimal('1000.50'), Decimal('-4.0'), None)
    """
    marked = NUMBER.search(plain_signs(text.partition(MARK)[2]))
    if marked:
        return value(marked.group())
    found = NUMBER.findall(plain_signs(text))
    return value(found[-1]) if found else None


def plain_signs(text: str) -> str:
    """Write every minus as a hyphen, and before the dollar sign."""
    return text.replace("\N{MINUS SIGN}", "-").replace("$-", "-$")


def value(number: str) -> Decimal:
    """Return a number without its commas and dollar sign; 2 and 2.0 are equal."""
    return Decimal(number.replace(",", "").replace("$", ""))


def same_words(text: str) -> str:
    """Lower the case and drop punctuation, articles and extra spaces, as SQuAD's evaluation does."""
    bare = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", bare).split())
