"""From a request to pieces of text: prompts as tokens, echoed with their log-probabilities, and what follows them."""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Sequence
from contextlib import closing
from typing import Any, NamedTuple

from torch import nn

from fedllm.app.chat import END
from fedllm.app.endpoint.asked import Bad, Chat, Completion
from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.evaluation.generate import how, prompt_ids
from fedllm.evaluation.tokens import Told, read_tokens, written_tokens

ECHOED = 1 << 28
"""Logits of one prompt that are held at most to tell its log-probabilities: 1 GB in float32."""


class Voice(NamedTuple):
    """The model that is served."""

    name: str
    note: str
    model: nn.Module
    tokenizer: Any
    context: int
    """Tokens that it reads and writes in all."""


class Entry(NamedTuple):
    """A token as text, where it begins in its choice's text, its log-probability and the likeliest in its place."""

    text: str
    start: int
    logprob: float | None
    top: Sequence[tuple[str, float]] = ()


class Piece(NamedTuple):
    """What is next of a choice's text; the last piece of a choice says why it ends."""

    number: int
    """The choice's number."""
    text: str
    entries: Sequence[Entry] = ()
    finish: str | None = None
    written: int = 0
    """Tokens that this piece cost."""


class Prompt(NamedTuple):
    """A prompt as tokens, and where each of them ends in its text."""

    text: str
    ids: list[int]
    ends: list[int]


class Saying(NamedTuple):
    """A request that can be answered."""

    prompts: list[Prompt]
    most: int
    """Tokens that each answer has at most."""
    top: int | None
    """The likeliest tokens that are told in each place; None tells no log-probabilities."""
    echo: bool
    stops: tuple[str, ...]
    bare: bool
    """Without a chat template: the answer begins after a space."""


def prepared(voice: Voice, asked: Chat | Completion) -> Saying:
    """Return what is to be said, or raise `Bad` for what does not fit into the model."""
    tokenizer = voice.tokenizer
    if isinstance(asked, Chat):
        try:
            ids = prompt_ids(tokenizer, [message.turn() for message in asked.messages])
        except FedllmError as error:
            raise Bad(400, str(error), "messages") from error
        bare = not tokenizer.chat_template
        stops = (*asked.stop, END) if bare else asked.stop
        asked_for = asked.max_completion_tokens or asked.max_tokens
        most = asked_for if asked_for is not None else max(1, voice.context - len(ids))
        saying = Saying([Prompt("", ids, [])], most, asked.top_logprobs if asked.logprobs else None, False, stops, bare)
    else:
        prompts = [prompt_of(tokenizer, text) for text in asked.prompt]
        saying = Saying(prompts, asked.max_tokens, asked.logprobs, asked.echo, asked.stop, False)
    longest = max(len(prompt.ids) for prompt in saying.prompts)
    if not longest:
        raise Bad(400, "The prompt has no tokens; give it some text.", "prompt")
    if longest + saying.most > voice.context:
        raise Bad(
            400,
            f"The model reads and writes {voice.context} tokens in all; the prompt has {longest} and the answer may "
            f"have {saying.most}.",
            "messages" if isinstance(asked, Chat) else "prompt",
            "context_length_exceeded",
        )
    if saying.echo and saying.top is not None and longest * len(tokenizer) > ECHOED:
        most = ECHOED // len(tokenizer)
        raise Bad(
            400, f"Log-probabilities are told of prompts of up to {most} tokens; this one has {longest}.", "prompt"
        )
    return saying


def prompt_of(tokenizer: Any, text: str) -> Prompt:
    """Tokenise a prompt as the model does, with the token that stands before every text if it is not there yet."""
    own = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    encoded = tokenizer(text, add_special_tokens=not own, return_offsets_mapping=True)
    if not text and not encoded["input_ids"] and tokenizer.eos_token_id is not None:
        return Prompt("", [tokenizer.bos_token_id or tokenizer.eos_token_id], [0])
    return Prompt(text, list(encoded["input_ids"]), [end for _, end in encoded["offset_mapping"]])


def said(voice: Voice, asked: Chat | Completion, saying: Saying) -> Iterator[Piece]:
    """Yield every choice piece by piece, one choice after the other; closing the iterator stops the model."""
    seed = secrets.randbits(62) if asked.seed is None else asked.seed
    settings = how(voice.model, voice.tokenizer, max(1, saying.most), asked.temperature, asked.top_p)
    told: list[list[Told]] = []
    if saying.echo and saying.top is not None:
        rows = [prompt.ids for prompt in saying.prompts]
        told = read_tokens(voice.model, rows, saying.top, len(voice.tokenizer))
    for place, prompt in enumerate(saying.prompts):
        for turn in range(asked.n):
            number = place * asked.n + turn
            start = 0
            if saying.echo:
                entries = echoed(voice.tokenizer, prompt, told[place]) if told else ()
                yield Piece(number, prompt.text, entries, None if saying.most else "length")
                start = len(prompt.text)
            if saying.most:
                tokens = written_tokens(
                    voice.model, prompt.ids, settings, derive(seed, "choice", number), saying.top or 0
                )
                yield from continued(voice.tokenizer, number, start, tokens, settings.eos_token_id or (), saying)
            elif not saying.echo:
                yield Piece(number, "", finish="length")


def echoed(tokenizer: Any, prompt: Prompt, told: Sequence[Told]) -> list[Entry]:
    """Return a prompt's tokens as entries; together their texts are the prompt's."""
    entries, start = [], 0
    for each, end in zip(told, prompt.ends, strict=True):
        entries.append(Entry(prompt.text[start:end], start, each.logprob, words(tokenizer, each)))
        start = max(start, end)
    return entries


def continued(
    tokenizer: Any, number: int, start: int, tokens: Iterator[Told], ends: Sequence[int], saying: Saying
) -> Iterator[Piece]:
    """Yield what is written from place `start` on, up to a stop; what may be a stop's beginning waits."""
    from tokenizers.decoders import DecodeStream

    stream = DecodeStream(skip_special_tokens=True)
    held, entries, written, finish, begun = "", list[Entry](), 0, "length", not saying.bare
    with closing(tokens):  # type: ignore[type-var]
        for told in tokens:
            text = stream.step(tokenizer.backend_tokenizer, told.token) or ""
            text = text if begun else text.lstrip()
            begun = begun or bool(text)
            entries.append(Entry(text, start + len(held), told.logprob, words(tokenizer, told)))
            held, written = held + text, written + 1
            clear, stopped = up_to_stop(held, saying.stops)
            if stopped:
                finish, held = "stop", held[:clear]
                entries = [entry for entry in entries if entry.start < start + clear]
                break
            if told.token in ends:
                finish, entries = "stop", entries[:-1]
                break
            if clear:
                out = [entry for entry in entries if entry.start < start + clear]
                yield Piece(number, held[:clear], out, None, written)
                held, start, entries, written = held[clear:], start + clear, entries[len(out) :], 0
    yield Piece(number, held, entries, finish, written)


def up_to_stop(text: str, stops: Sequence[str]) -> tuple[int, bool]:
    r"""Return how much of a text is clear of stops, and whether there is a stop after it.

    >>> up_to_stop("One\nQ: two", ["\nQ:"]), up_to_stop("One\nQ", ["\nQ:"]), up_to_stop("One", ["\nQ:"])
    ((3, True), (3, False), (3, False))
    """
    found = [place for stop in stops if (place := text.find(stop)) >= 0]
    if found:
        return min(found), True
    sizes = (next((n for n in range(len(stop) - 1, 0, -1) if text.endswith(stop[:n])), 0) for stop in stops)
    return len(text) - max(sizes, default=0), False


def words(tokenizer: Any, told: Told) -> list[tuple[str, float]]:
    """Return the likeliest tokens in a place as text; of several with the same text the likeliest."""
    found: dict[str, float] = {}
    for token, logprob in told.top:
        found.setdefault(tokenizer.decode([token]), logprob)
    return list(found.items())
