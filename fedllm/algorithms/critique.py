"""A prompt mended by what a silo got wrong with it.

ProTeGi, Pryzant et al. 2023 (arXiv:2305.03495), section 2: a model reads a prompt and examples that it gets wrong and
says what the matter is (their gradient), then edits the prompt so that this is mended (their step). Both happen at the
silo, with its own model: wrong examples and critique stay there, and the edited prompt is looked through before it
leaves. Their beam and its bandit are those of `text_prompt.py`, over all silos.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from fedllm.algorithms.budget import Budget
from fedllm.algorithms.trying import WRITTEN, placed, tokens_since
from fedllm.silo.answers import same_words
from fedllm.silo.asking import answers
from fedllm.silo.endpoint import Unanswered
from fedllm.silo.questions import Asking, Question
from fedllm.silo.speaker import Speaker, Writing
from fedllm.silo.templates import Turn

ERRORS = 4
"""Wrong examples that a critique is shown, as many as the paper's at a time."""

ROOM = 64
"""Tokens that a chat's template may add to what is asked."""

CRITIQUE = """A prompt for a classifier is: "{prompt}"

With it these examples get wrong answers:

{errors}

In one or two sentences: what is wrong with the prompt?"""

EDIT = """A prompt for a classifier is: "{prompt}"

What is wrong with it: {critique}

Write a better prompt of one or two sentences. Quote none of the examples. Write the prompt alone."""


class Mended(NamedTuple):
    """The edited prompt, or nothing, and what it took."""

    texts: list[str]
    spent: Budget
    answered: bool = True
    """Whether the model answered whenever it was asked."""


def mended(
    speaker: Speaker, asking: Asking, prompt: str, questions: Sequence[Question], seed: int, room: Budget
) -> Mended:
    """Return the prompt after a critique of what it gets wrong; nothing where all is right or the room too small."""
    before, calls, whole = speaker.used(), 0, placed(asking, prompt)

    def pays_for(more: int, read: int, written: int) -> bool:
        # A token is a byte or more, so that bytes are the most that a text can cost.
        left = room.minus(calls, tokens_since(before, speaker))
        return left.calls >= more and left.tokens >= read + written

    def write(question: str, place: int) -> str | None:
        nonlocal calls
        if not pays_for(1, len(question.encode()) + ROOM, WRITTEN):
            return None
        calls += 1
        (text,) = speaker.write([[Turn("user", question)]], Writing(WRITTEN, 0.7, seed=seed + place))
        return " ".join(text.strip().strip('"').split())

    def steps() -> str | None:
        nonlocal calls
        read = sum(
            len(whole(each.text).encode()) + len(word.encode()) + 2 for each in questions for word in asking.words
        )
        if not pays_for(len(questions) + 2, read, 2 * WRITTEN):
            return None
        calls += len(questions)
        given = answers(speaker, asking, whole, questions)
        pairs = zip(questions, given, strict=True)
        wrong = [(each, said) for each, said in pairs if same_words(said) != same_words(each.answer)][:ERRORS]
        shown = "\n\n".join(f"Text: {each.text}\nRight: {each.answer}\nGiven: {said}" for each, said in wrong)
        critique = write(CRITIQUE.format(prompt=prompt, errors=shown), 0) if wrong else None
        return write(EDIT.format(prompt=prompt, critique=critique), 1) if critique else None

    try:
        text, answered = steps(), True
    except Unanswered:
        text, answered = None, False
    texts = [text] if text and text != prompt else []
    return Mended(texts, Budget(calls, tokens_since(before, speaker)), answered)
