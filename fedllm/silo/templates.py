"""A conversation as text, cut into the pieces that are scored and those that are not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from fedllm.core.errors import FedllmError


class Turn(NamedTuple):
    """One message of a conversation."""

    role: str
    content: str


def render(tokenizer: Any, turns: Sequence[Turn], chat: bool) -> list[tuple[str, bool]]:
    """Return the conversation as pieces of text, True for what the assistant says (and the end after it)."""
    return chat_pieces(tokenizer, turns) if chat else plain_pieces(tokenizer, turns)


def plain_pieces(tokenizer: Any, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """Render for a tokenizer without a template: `Question:`, `Answer:`, the end token."""
    heads = {"user": "Question: ", "assistant": "Answer:", "system": ""}
    pieces = [(first_token(tokenizer), False)]
    for turn in turns:
        head = heads.get(turn.role, f"{turn.role}: ")
        if turn.role == "assistant":
            pieces += [(head, False), (f" {turn.content}{tokenizer.eos_token or ''}", True)]
        else:
            pieces.append((f"{head}{turn.content}\n", False))
    return pieces


def first_token(tokenizer: Any) -> str:
    """Return the token that a tokenizer puts before every text of its own accord, or nothing."""
    ids = tokenizer("a")["input_ids"]
    return tokenizer.bos_token if ids and ids[0] == tokenizer.bos_token_id else ""


def chat_pieces(tokenizer: Any, turns: Sequence[Turn]) -> list[tuple[str, bool]]:
    """Render with the tokenizer's own template; what is scored is found by rendering prefixes.

    A template that rewrites earlier text when a message follows has no such prefixes and is refused.
    """
    pieces, done = list[tuple[str, bool]](), ""
    for place, turn in enumerate(turns):
        if turn.role != "assistant":
            continue
        before = apply(tokenizer, turns[:place], add_generation_prompt=True)
        after = apply(tokenizer, turns[: place + 1], add_generation_prompt=False)
        if not (before.startswith(done) and after.startswith(before)):
            raise FedllmError(
                "The tokenizer's chat template cannot be masked: what it makes of a prompt is not the start of what "
                "it makes of prompt and response; set task.template = 'plain' or give the tokenizer another template."
            )
        pieces += [(before[len(done) :], False), (after[len(before) :], True)]
        done = after
    return pieces


def apply(tokenizer: Any, turns: Sequence[Turn], add_generation_prompt: bool) -> str:
    """Render turns with the tokenizer's chat template."""
    messages = [turn._asdict() for turn in turns]
    try:
        return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=add_generation_prompt)
    except Exception as error:  # a template is a program of the model's author and may raise anything
        raise FedllmError(
            f"The tokenizer's chat template refuses a conversation of {', '.join(t.role for t in turns)} ({error}); "
            "set task.template = 'plain'."
        ) from error


def opening(tokenizer: Any, turns: Sequence[Turn], chat: bool) -> str:
    """Return the conversation as text up to where the assistant speaks next."""
    if chat:
        return apply(tokenizer, turns, add_generation_prompt=True)
    return "".join(text for text, _ in plain_pieces(tokenizer, turns)) + "Answer:"
