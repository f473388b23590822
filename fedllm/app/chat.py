"""Talk to a model in the terminal, or through a pipe: each line is a message."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

from rich.console import Console

from fedllm.app.result import Opened, open_result, spoken
from fedllm.core.errors import FedllmError
from fedllm.evaluation.generate import chat_once, prompt_ids
from fedllm.silo.templates import Turn

RESET = "/reset"
END = "\nQuestion:"
"""Where a model without a chat template goes on to ask itself."""


def talk(target: Path, max_tokens: int, base: bool, console: Console) -> None:
    """Answer messages until the input ends; a terminal's ends with an empty line too."""
    opened = open_result(target, base)
    tokenizer, room = spoken(opened), context(opened)
    most = min(max_tokens, room // 2)
    typed = sys.stdin.isatty()
    say(console, f"{opened.note}; {RESET} forgets, " + ("an empty line ends." if typed else "the end of input ends."))
    history: list[Turn] = []
    for message in messages(console, typed):
        if message == RESET:
            history = []
            say(console, "(forgotten)")
            continue
        asked, dropped = fitting(tokenizer, [*history, Turn("user", message)], room - most)
        if not asked:
            say(console, f"(that is longer than the {room - most} tokens that the model can read; say it shorter)")
            continue
        if dropped:
            say(console, f"(the oldest {dropped} messages no longer fit and are forgotten)")
        answer = speak(console, chat_once(opened.model, tokenizer, asked, max_new_tokens=most))
        history = [*asked, Turn("assistant", answer)]


def messages(console: Console, typed: bool) -> Iterator[str]:
    """Yield what the user says."""
    while True:
        try:
            if typed:
                console.print()
                line = console.input("[bold cyan]you:[/] ")
            else:
                line = sys.stdin.readline()
                if not line:
                    return
        except (EOFError, KeyboardInterrupt):
            console.print()
            return
        if typed and not line.strip():
            return
        if line.strip():
            if not typed:
                console.print()
                say(console, f"you: {line.strip()}")
            yield line.strip()


def speak(console: Console, pieces: Iterator[str]) -> str:
    """Print an answer as it is written and return it; Ctrl-C ends it early."""
    console.print("[bold green]model:[/] ", end="")
    said = ""
    with closing(pieces):  # type: ignore[type-var]
        try:
            for piece in up_to(END, pieces):
                piece = piece if said else piece.lstrip()
                said += piece
                console.print(piece, end="", markup=False, highlight=False, soft_wrap=True)
        except KeyboardInterrupt:
            console.print(" (stopped)", end="")
    console.print()
    return said.strip()


def up_to(end: str, pieces: Iterable[str]) -> Iterator[str]:
    r"""Yield a text's pieces up to where `end` comes, however it is cut.

    >>> list(up_to("\nQ:", ["One\n", "two\nQ", ": three", "!"]))
    ['One', '\ntwo']
    """
    held = ""
    for piece in pieces:
        before, found, _ = (held + piece).partition(end)
        if found:
            if before:
                yield before
            return
        keep = next((size for size in range(len(end) - 1, 0, -1) if before.endswith(end[:size])), 0)
        held = before[len(before) - keep :]
        if before[: len(before) - keep]:
            yield before[: len(before) - keep]
    if held:
        yield held


def fitting(tokenizer: Any, turns: list[Turn], room: int) -> tuple[list[Turn], int]:
    """Return the newest turns that fit into `room` tokens, from a user's on, and how many older ones do not."""
    dropped = 0
    while len(turns) > dropped:
        if len(prompt_ids(tokenizer, turns[dropped:])) <= room:
            return turns[dropped:], dropped
        dropped += 2
    return [], dropped


def context(opened: Opened) -> int:
    """Return how many tokens the model can read and write in all."""
    config = getattr(opened.model, "active_peft_config", None)
    learned = config.num_virtual_tokens if config is not None and config.is_prompt_learning else 0
    model: Any = opened.model
    room = int(getattr(model.config, "max_position_embeddings", 0) or 4096) - learned
    if room < 8:
        raise FedllmError(f"The model reads {room} tokens, too few to talk; use another.")
    return room


def say(console: Console, text: str) -> None:
    """Print a line that is not the model's."""
    console.print(text, style="dim", markup=False, highlight=False, soft_wrap=True)
