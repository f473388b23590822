"""How well a prompt does at a silo: by log-probabilities where the model tells them, else by what it writes."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from fedllm.core.seeds import generator
from fedllm.silo.answers import final, same_words
from fedllm.silo.questions import Asking, Question
from fedllm.silo.scoring import Scored, choose_word
from fedllm.silo.speaker import Speaker, Writing
from fedllm.silo.templates import Turn

SHORT = 12
"""Tokens that a model may write where only a label's word is wanted."""


class Measured(NamedTuple):
    """How a prompt did on some questions."""

    value: float
    """What prompts are compared by: the mean log-probability of what is right, or the share of right answers."""
    loss: float | None
    """Nats a token of the right answers; None where the model does not tell."""
    accuracy: float | None
    tokens: int


Prompt = Callable[[str], str]
"""From a question to what stands before its answer."""


def filled(template: str) -> Prompt:
    """Return the prompt of a template."""
    return lambda text: template.replace("{text}", text)


def measure(
    speaker: Speaker, asking: Asking, prompts: Sequence[Prompt], questions: Sequence[Question]
) -> list[Measured]:
    """Return how each of several prompts does; all are scored in one go.

    With words the likeliest one is the answer, by its summed log-probability, and `value` is the log-probability of the
    right one among them. Without, `value` is that of the whole answer by its tokens.
    """
    if speaker.score is None:
        return [by_writing(speaker, asking, prompt, questions) for prompt in prompts]
    choices = [list(asking.words) if asking.words else [question.answer] for question in questions]
    pairs = [
        (prompt(question.text), f" {word}")
        for prompt in prompts
        for question, words in zip(questions, choices, strict=True)
        for word in words
    ]
    scores, found = iter(speaker.score(pairs)), []
    for _ in prompts:
        told = [[next(scores) for _ in words] for words in choices]
        found.append(summed(told, questions, asking.words))
    return found


def summed(told: Sequence[Sequence[Scored]], questions: Sequence[Question], words: Sequence[str]) -> Measured:
    """Sum up the scores of one prompt: of each question its words, or its answer alone."""
    value, loss, tokens, right = 0.0, 0.0, 0, 0
    for scores, question in zip(told, questions, strict=True):
        own = words.index(question.answer) if words else 0
        totals = [score.total for score in scores]
        loss -= totals[own]
        tokens += scores[own].tokens
        right += likeliest(totals, words) == own
        value += totals[own] - log_sum(totals) if words else totals[own] / scores[own].tokens
    count = max(1, len(questions))
    accuracy = right / count if words else None
    return Measured(value / count, loss / max(1, tokens), accuracy, tokens)


def likeliest(totals: Sequence[float], words: Sequence[str]) -> int:
    """Return the place of the likeliest answer; one that begins others has what is left of its probability.

    >>> likeliest([-0.5, -0.6, -3.0], ["card", "card payment", "cash"])
    1
    """
    return choose_word(totals, [word.split() for word in words]) if words else 0


def answers(speaker: Speaker, asking: Asking, prompt: Prompt, questions: Sequence[Question]) -> list[str]:
    """Return the model's answer to each question, where the task has words."""
    if speaker.score is None:
        asked = [[Turn("user", prompt(question.text))] for question in questions]
        return speaker.write(asked, Writing(max_tokens=SHORT))
    words = asking.words
    scores = speaker.score([(prompt(question.text), f" {word}") for question in questions for word in words])
    totals = [score.total for score in scores]
    rows = [totals[first : first + len(words)] for first in range(0, len(totals), len(words))]
    return [words[likeliest(row, words)] for row in rows]


def by_writing(speaker: Speaker, asking: Asking, prompt: Prompt, questions: Sequence[Question]) -> Measured:
    """Measure by what the model writes: only the very answer is right."""
    most = SHORT if asking.words else 256
    texts = speaker.write([[Turn("user", prompt(question.text))] for question in questions], Writing(max_tokens=most))
    same = same_words if asking.words else final
    right = [same(text) == same(question.answer) for text, question in zip(texts, questions, strict=True)]
    share = sum(right) / max(1, len(right))
    return Measured(share, None, share, len(texts))


def log_sum(values: Sequence[float]) -> float:
    """Return the logarithm of the sum of the exponentials."""
    top = max(values)
    return top + math.log(sum(math.exp(value - top) for value in values))


def drawn(questions: Sequence[Question], count: int, seed: int, *address: str | int) -> list[Question]:
    """Return `count` of the questions, drawn at an address: the same ones each time."""
    import torch

    order = torch.randperm(len(questions), generator=generator(seed, "questions", *address)).tolist()
    return [questions[place] for place in sorted(order[:count])]
