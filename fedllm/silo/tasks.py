"""From rows to examples: instruction tuning, plain text, classification by label words."""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple

from fedllm.core.errors import FedllmError
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.readers import Row
from fedllm.silo.streams import packed
from fedllm.silo.templates import Turn, first_token, render

NEUTRAL = ("N/A", "[MASK]", "")
"""Texts that say nothing (Zhao et al. 2021, arXiv:2102.09690, section 5)."""


class Prepared(NamedTuple):
    """A silo's examples, and how many rows gave none because nothing of them could be scored."""

    examples: Sequence[Example]
    skipped: int


class Task(NamedTuple):
    """What is learned from a row; `prepare(rows, where)` names `where` in its errors.

    `label` is the column that says what kind of row it is, if there is one, `words` what the model
    may answer, and `cue` the text that stands before the answer of every row. `neutral` are rows that say nothing,
    each with one of the words after it: what the model answers there it leans to anyway.
    """

    name: str
    prepare: Callable[[Sequence[Row], str], Prepared]
    label: str | None = None
    words: Sequence[str] = ()
    cue: str = ""
    template: str = ""
    """How a row is asked, `{text}` standing for it, where all rows are asked alike."""
    neutral: Sequence[Example] = ()


def instruct(
    tokenizer: Any,
    *,
    max_tokens: int = 512,
    prompt: str = "prompt",
    response: str = "response",
    template: Literal["auto", "chat", "plain"] = "auto",
) -> Task:
    """Instruction tuning: the loss is on the responses only.

    A row has `prompt` and `response` (or columns of your own names), or `messages`, or Alpaca's
    `instruction`, `input`, `output`. `auto` takes the tokenizer's chat template if it has one.
    Responses are cut at `max_tokens`; a row whose prompt alone is as long is skipped and counted.
    """
    if template == "chat" and not tokenizer.chat_template:
        raise FedllmError("task.template is 'chat' but this tokenizer has no chat template; use template = 'plain'.")
    chat = bool(tokenizer.chat_template) and template != "plain"

    def prepare(rows: Sequence[Row], where: str) -> Prepared:
        examples = []
        for number, row in enumerate(rows, 1):
            turns = conversation(row, prompt, response, f"{where}, row {number}")
            example = tokenise(tokenizer, render(tokenizer, turns, chat), max_tokens)
            if example:
                examples.append(example)
        return Prepared(examples, len(rows) - len(examples))

    return Task("instruct", prepare)


def conversation(row: Row, prompt: str, response: str, where: str) -> list[Turn]:
    """Return the turns of a row in any of the three shapes."""
    if isinstance(row.get("messages"), (list, tuple)) or hasattr(row.get("messages"), "tolist"):
        turns = [
            Turn(text_in(message, "role", where), text_in(message, "content", where)) for message in row["messages"]
        ]
        if not any(turn.role == "assistant" for turn in turns):
            raise FedllmError(f"{where}: 'messages' has no message of role 'assistant'; remove the row or add one.")
        return turns
    if prompt in row and response in row:
        return [Turn("user", text_in(row, prompt, where)), Turn("assistant", text_in(row, response, where))]
    if "instruction" in row and "output" in row:
        extra = f"\n\n{row['input']}" if row.get("input") else ""
        asked = text_in(row, "instruction", where)
        return [Turn("user", f"{asked}{extra}"), Turn("assistant", text_in(row, "output", where))]
    raise FedllmError(
        f"{where}: no columns '{prompt}' and '{response}' (nor 'messages', nor 'instruction' and 'output') among "
        f"{', '.join(sorted(row)) or 'none'}; name yours with task.prompt and task.response."
    )


def text_in(row: Row, column: str, where: str) -> str:
    """Return the text of a column, which must be there and not null."""
    if row.get(column) is None:
        raise FedllmError(f"{where}: '{column}' has no value; remove the row or fill it in.")
    return str(row[column])


def tokenise(tokenizer: Any, pieces: Sequence[tuple[str, bool]], max_tokens: int) -> Example | None:
    """Tokenise the pieces as one text, scoring the tokens that end in a marked piece; None if no such token fits."""
    if not tokenizer.is_fast:
        raise FedllmError(
            f"{type(tokenizer).__name__} cannot say where its tokens stand; use the model's fast tokenizer."
        )
    text = "".join(piece for piece, _ in pieces)
    encoded = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    scored, ends, place = list[bool](), list[int](), 0
    for piece, mark in pieces:
        place += len(piece)
        ends.append(place)
        scored.append(mark)
    ids = encoded["input_ids"][:max_tokens]
    marks = [scored[min(bisect_left(ends, end), len(ends) - 1)] for _, end in encoded["offset_mapping"]]
    labels = [token if mark else IGNORED for token, mark in zip(ids, marks, strict=False)]
    return Example(ids, labels) if any(label >= 0 for label in labels[1:]) else None


def causal(tokenizer: Any, *, block: int = 256, text: str = "text") -> Task:
    """Plain language modelling: texts joined by the end token and cut into blocks of `block` tokens.

    The text may be larger than memory (see `streams`).
    """
    if block < 2:
        raise FedllmError(f"task.block is {block}; it must be at least 2.")

    def prepare(rows: Sequence[Row], where: str) -> Prepared:
        before = first_token(tokenizer)

        used = 0

        def texts() -> Iterator[str]:
            nonlocal used
            used = 0
            for number, row in enumerate(rows, 1):
                if text not in row:
                    raise FedllmError(
                        f"{where}, row {number}: no column '{text}' among {', '.join(sorted(row))}; "
                        "name yours with task.text."
                    )
                if said := text_in(row, text, f"{where}, row {number}"):
                    used += 1
                    yield f"{before}{said}{tokenizer.eos_token}"

        blocks = packed(texts, tokenizer, block)
        return Prepared(blocks, len(rows) - used)

    return Task("causal", prepare)


def classify(
    tokenizer: Any,
    *,
    text: str = "text",
    label: str = "label",
    words: Mapping[str, str] | Sequence[str] | None = None,
    template: str = "{text}\nLabel:",
    max_tokens: int = 512,
) -> Task:
    """Classification by label words: after the template the model says the word of the label.

    `words` maps a label to its word, or lists the labels, whose words are they with a space for each `_`; without it
    a label is its own word, and there is no accuracy. A word may be several tokens.
    """
    word_of = words_by_label(words) if words is not None else None
    if "{text}" not in template:
        raise FedllmError("task.template has no {text}; put it where the row's text goes.")

    def prepare(rows: Sequence[Row], where: str) -> Prepared:
        examples = []
        for number, row in enumerate(rows, 1):
            for column in (text, label):
                if column not in row:
                    raise FedllmError(
                        f"{where}, row {number}: no column '{column}' among {', '.join(sorted(row))}; name yours "
                        "with task.text and task.label."
                    )
            said, kind = (text_in(row, column, f"{where}, row {number}") for column in (text, label))
            asked = first_token(tokenizer) + template.replace("{text}", said)
            pieces = [(asked, False), (label_word(kind, word_of), True)]
            example = tokenise(tokenizer, pieces, sys.maxsize)
            if example and len(example.input_ids) <= max_tokens:
                examples.append(example)
        return Prepared(examples, len(rows) - len(examples))

    def neutral_row(said: str) -> Example | None:
        asked = first_token(tokenizer) + template.replace("{text}", said)
        # As for a row: without any text before the word its first token could not be scored.
        return tokenise(tokenizer, [(asked or ".", False), (f" {known[0]}", True)], sys.maxsize)

    cue = template.rpartition("{text}")[2]
    known = tuple(word_of.values()) if word_of else ()
    neutral = [example for said in NEUTRAL if (example := neutral_row(said))] if known else []
    return Task("classify", prepare, label, known, cue, template, neutral)


def words_by_label(words: Mapping[str, str] | Sequence[str]) -> Mapping[str, str]:
    """Return the word of each label.

    >>> words_by_label(["card_lost", "refund"])
    {'card_lost': 'card lost', 'refund': 'refund'}
    """
    return words if isinstance(words, Mapping) else {each: each.replace("_", " ") for each in words}


def label_word(label: str, words: Mapping[str, str] | None) -> str:
    """Return what the model says for a label, with the space before it that a word has in running text."""
    if words is None:
        return f" {label}"
    if label not in words:
        raise FedllmError(f"task.words has no word for the label '{label}'; it knows {', '.join(sorted(words))}.")
    return f" {words[label]}"


def word_tokens(tokenizer: Any, task: Task) -> list[tuple[int, ...]]:
    """Return the tokens of each of a task's words, as they are cut after its cue."""
    found = []
    for word in dict.fromkeys(task.words):
        example = tokenise(tokenizer, [(task.cue or ".", False), (f" {word}", True)], sys.maxsize)
        if example:
            found.append(tuple(label for label in example.labels if label != IGNORED))
    return found
