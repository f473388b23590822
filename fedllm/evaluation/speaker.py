"""A model in this process as prompt methods see it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from fedllm.core.types import ignore
from fedllm.evaluation.generate import complete, prompt_ids
from fedllm.silo.objective import Objective
from fedllm.silo.scoring import Scored, continuation, score_continuations
from fedllm.silo.speaker import Speaker, Used, Writing
from fedllm.silo.templates import Turn, first_token


def in_process(
    model: nn.Module,
    tokenizer: Any,
    objective: Objective,
    *,
    batch_size: int = 16,
    tick: Callable[[int], None] = ignore,
) -> Speaker:
    """Return what speaks and scores with a model that is here; `tick` is told the tokens of every batch."""
    counted = [Used()]

    def note(read: int, written: int, calls: int) -> None:
        before = counted[0]
        counted[0] = Used(before.calls + calls, before.read + read, before.written + written)

    def write(conversations: Sequence[Sequence[Turn]], writing: Writing) -> list[str]:
        def heard(tokens: int) -> None:
            note(0, tokens, 0)
            tick(tokens)

        note(sum(len(prompt_ids(tokenizer, turns)) for turns in conversations), 0, len(conversations))
        texts = complete(
            model,
            tokenizer,
            conversations,
            max_new_tokens=writing.max_tokens,
            temperature=writing.temperature,
            top_p=writing.top_p,
            seed=writing.seed,
            batch_size=batch_size,
            tick=heard,
        )
        return [cut(text, writing.stop) for text in texts]

    def score(pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        def heard(tokens: int) -> None:
            note(tokens, 0, 0)
            tick(tokens)

        start = first_token(tokenizer)
        asked = [continuation(tokenizer, start + before, after) for before, after in pairs]
        note(0, 0, len(asked))
        pad = tokenizer.pad_token_id or 0
        return score_continuations(model, asked, objective, pad_id=pad, batch_size=batch_size, tick=heard)

    return Speaker(write, score, lambda: counted[0])


def cut(text: str, stops: Sequence[str]) -> str:
    r"""Return a text up to the first of the stops.

    >>> cut("12\n\nQuestion: 7", ["Question:", "\n\n"])
    '12'
    """
    places = [place for stop in stops if (place := text.find(stop)) >= 0]
    return text[: min(places, default=len(text))].strip()
