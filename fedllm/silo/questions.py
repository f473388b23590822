"""Rows as questions and answers in plain text, for methods that send prompts and learn nothing inside a model."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from fedllm.core.errors import FedllmError
from fedllm.silo.answers import same_words
from fedllm.silo.tasks import Row, conversation, text_in, words_by_label


class Question(NamedTuple):
    """What is asked, what is right, and a number that the same question has at every silo."""

    text: str
    answer: str
    number: int


class Asking(NamedTuple):
    """How a task's rows are asked."""

    read: Callable[[Sequence[Row], str], list[Question]]
    template: str
    """The prompt, with {text} where the question goes; the answer follows after a space."""
    words: tuple[str, ...]
    """The answers that there are; without any the answer is free text."""
    texts: Callable[[Sequence[Row], str], list[str]]
    """The questions alone, of rows that need no answer."""


def asking(task: Mapping[str, Any]) -> Asking | None:
    """Return how the rows of a recipe's task are asked, or None for a task that asks nothing.

    Raises `FedllmError` for a classification that does not say its words.

    A row's column `id`, if there is one, says which questions of different silos are the same; else it is their words.
    """
    if task["name"] == "classify":
        return classified(task)
    if task["name"] != "instruct":
        return None
    prompt, response = task.get("prompt", "prompt"), task.get("response", "response")

    def read(rows: Sequence[Row], where: str) -> list[Question]:
        found = []
        for number, row in enumerate(rows, 1):
            turns = conversation(row, prompt, response, f"{where}, row {number}")
            last = max(place for place, turn in enumerate(turns) if turn.role == "assistant")
            asked = "\n\n".join(turn.content for turn in turns[:last])
            if asked.strip() and turns[last].content.strip():
                found.append(Question(asked, turns[last].content, number_of(row, asked)))
        return found

    def texts(rows: Sequence[Row], where: str) -> list[str]:
        return [each.text for each in read([{response: "-", **row} for row in rows], where)]

    return Asking(read, "Question: {text}\nAnswer:", (), texts)


def classified(task: Mapping[str, Any]) -> Asking:
    """Return how rows are asked for their label's word."""
    text, label = task.get("text", "text"), task.get("label", "label")
    if not task.get("words"):
        raise FedllmError("task.words is missing: a method that sends prompts has to know which answers there are.")
    words = words_by_label(task["words"])

    def read(rows: Sequence[Row], where: str) -> list[Question]:
        found = []
        for number, row in enumerate(rows, 1):
            here = f"{where}, row {number}"
            said, kind = text_in(row, text, here), text_in(row, label, here)
            if kind not in words:
                raise FedllmError(f"{here}: task.words has no word for '{kind}'; it knows {', '.join(sorted(words))}.")
            found.append(Question(said, words[kind], number_of(row, said)))
        return found

    def texts(rows: Sequence[Row], where: str) -> list[str]:
        return [text_in(row, text, f"{where}, row {number}") for number, row in enumerate(rows, 1)]

    template = task.get("template", "{text}\nLabel:")
    if template.count("{text}") != 1:
        raise FedllmError("task.template has not {text} once; put it where the row's text goes.")
    return Asking(read, template, tuple(dict.fromkeys(words.values())), texts)


def number_of(row: Row, text: str) -> int:
    """Return the 63-bit number of a question: of its `id`, or of its words."""
    said = f"id {row['id']}" if row.get("id") is not None else same_words(text)
    return int.from_bytes(hashlib.blake2b(said.encode(), digest_size=8).digest(), "big") >> 1
