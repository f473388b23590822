"""How a silo tries text prompts on its own examples: with a model whose weights are here, or one that only answers.

Both put the same prompts before the same examples and compare by the same words. A call is a prompt with an example.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedllm.algorithms.asking import asked_of, evaluating
from fedllm.algorithms.budget import Budget
from fedllm.algorithms.method import Ground
from fedllm.core.errors import FedllmError
from fedllm.core.texts import texts_in
from fedllm.core.types import Client, Request, Silo
from fedllm.silo.asking import Measured, Prompt, measure
from fedllm.silo.candidates import Measure, Reader, require_measure, require_reading
from fedllm.silo.prompted import cost_of, prompt_tokens, prompted_held_out, text_scores
from fedllm.silo.questions import Asking
from fedllm.silo.reading import plain
from fedllm.silo.speaker import Speaker, Used, Writing
from fedllm.silo.tasks import word_tokens
from fedllm.silo.templates import Turn

WRITTEN = 64
"""Tokens of a prompt that a model writes, at most."""


class Tried(NamedTuple):
    """The mean score of each prompt, lower being better, on how many examples, and what that took."""

    scores_P: Tensor
    examples: int
    spent: Budget


class Trying(NamedTuple):
    """How prompts are tried."""

    score: Callable[[Silo, Sequence[str], Sequence[Any], Budget], Tried]
    """Scores the prompts on as many of the examples as the budget pays for."""
    evaluator: Client
    length: Callable[[str], int]
    """How long a prompt is, in what `longest` counts."""


def trying(ground: Ground, score: Measure) -> Trying:
    """Return how prompts are tried where this run's model is; where it is away, so is its tokenizer."""
    return reading(ground, score) if ground.tokenizer else answering(ground, score)


def reading(ground: Ground, score: Measure) -> Trying:
    """Try prompts with the model at hand, each read once for all examples."""
    tokenizer, words = ground.tokenizer, word_tokens(ground.tokenizer, ground.task)
    require_measure(score, words)
    require_reading(plain(ground.model))

    def scored(silo: Silo, texts: Sequence[str], examples: Sequence[Any], allowed: Budget) -> Tried:
        chosen, spent = affordable(examples, texts, tokenizer, allowed)
        if not chosen:
            raise FedllmError("The budget of this round does not pay for one example; raise algorithm.tokens.")
        reader = Reader(silo.model, words, tokenizer.pad_token_id, ground.batch_size, silo.tick)
        return Tried(text_scores(reader, tokenizer, texts, chosen, score), len(chosen), spent)

    return Trying(
        scored,
        prompted_held_out(tokenizer, words, batch_size=ground.batch_size),
        lambda text: len(prompt_tokens(tokenizer, text)),
    )


def answering(ground: Ground, score: Measure) -> Trying:
    """Try prompts by asking a model behind an API; lengths are words and marks, since its tokens are not known."""
    asking = asked_of(ground, "text_prompt")
    require_measure(score, asking.words)

    def scored(silo: Silo, texts: Sequence[str], examples: Sequence[Any], allowed: Budget) -> Tried:
        speaker = ground.speaker(silo)
        if speaker.score is None and score != "accuracy":
            raise FedllmError(
                f"algorithm.score is '{score}', but the model at the endpoint tells no log-probabilities of prompts; "
                "set it to 'accuracy', or use an endpoint that does."
            )
        chosen, before = examples[: allowed.calls // len(texts)], speaker.used()
        found = measure(speaker, asking, [placed(asking, text) for text in texts], chosen)
        silo.tick(0)
        values = [value_of(each, score, asking) for each in found]
        spent = Budget(len(texts) * len(chosen), tokens_since(before, speaker))
        return Tried(torch.tensor(values, dtype=torch.float64), len(chosen), spent)

    def evaluated(request: Request, silo: Silo) -> Measured:
        (text,) = [""] if request.scalars.get("base") else texts_in("prompt", request.tensors, most=1)
        return measure(ground.speaker(silo), asking, [placed(asking, text)], silo.data["test"])[0]

    return Trying(scored, evaluating(evaluated), lambda text: len(re.findall(r"\w+|[^\w\s]", text)))


def placed(asking: Asking, text: str) -> Prompt:
    """Return a text prompt with the task's template behind it, on a line of its own."""
    head = f"{text}\n" if text else ""
    return lambda said: head + asking.template.replace("{text}", said)


def value_of(found: Measured, score: Measure, asking: Asking) -> float:
    """Return what was measured as a score of which less is better."""
    if score == "accuracy":
        return 1.0 - (found.accuracy or 0.0)
    return found.loss if score == "loss" and asking.words and found.loss is not None else -found.value


def tokens_since(before: Used, speaker: Speaker) -> int:
    """Return the tokens that a model read and wrote since then."""
    now = speaker.used()
    return now.read + now.written - before.read - before.written


def affordable(
    examples: Sequence[Any], texts: Sequence[str], tokenizer: Any, allowed: Budget
) -> tuple[list[Any], Budget]:
    """Return as many of the examples as the budget pays for with every prompt, and what that takes."""
    chosen, spent = list[Any](), Budget(0, 0)
    for example in examples:
        more = Budget(spent.calls + len(texts), spent.tokens + cost_of(tokenizer, texts, example))
        if more.calls > allowed.calls or more.tokens > allowed.tokens:
            break
        chosen, spent = [*chosen, example], more
    return chosen, spent


def writer(ground: Ground, temperature: float = 0.9) -> Callable[[str, int], tuple[str, int]]:
    """Return `write(question, seed)` of the server's model: what it wrote, and the tokens that took.

    `Unanswered` is raised where it is behind an API that does not answer.
    """

    def write(question: str, seed: int) -> tuple[str, int]:
        speaker = ground.speaker(Silo("server", ground.model, {}, {}, ground.seed))
        before = speaker.used()
        (text,) = speaker.write([[Turn("user", question)]], Writing(WRITTEN, temperature, seed=seed))
        return text, tokens_since(before, speaker)

    return write
