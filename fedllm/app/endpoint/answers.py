"""Answers in OpenAI's shape: whole, in chunks, and errors."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeAlias

from fedllm.app.endpoint.asked import Asked, Bad, Chat, Completion
from fedllm.app.endpoint.speech import Entry, Piece, Saying

Json: TypeAlias = dict[str, Any]

KINDS = {400: "invalid_request_error", 401: "authentication_error", 404: "invalid_request_error"}


def error(bad: Bad) -> Json:
    """Return an error."""
    kind = KINDS.get(bad.status, "rate_limit_error" if bad.status == 429 else "server_error")
    kind = "invalid_request_error" if bad.status in (405, 413, 415) else kind
    return {"error": {"message": bad.message, "type": kind, "param": bad.param, "code": bad.code}}


def head(asked: Asked, chunk: bool) -> Json:
    """Return what every answer begins with."""
    chat = isinstance(asked, Chat)
    kind = ("chat.completion.chunk" if chunk else "chat.completion") if chat else "text_completion"
    name = f"{'chatcmpl' if chat else 'cmpl'}-{secrets.token_hex(12)}"
    return {"id": name, "object": kind, "created": int(time.time()), "model": asked.model}


def usage(saying: Saying, written: int) -> Json:
    """Count the tokens of a request."""
    read = sum(len(prompt.ids) for prompt in saying.prompts)
    return {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written}


def whole(asked: Chat | Completion, saying: Saying, pieces: Iterable[Piece]) -> Json:
    """Return the answer once it is all there."""
    choices = [Piece(number, "", []) for number in range(len(saying.prompts) * asked.n)]
    for piece in pieces:
        before = choices[piece.number]
        text, entries = before.text + piece.text, [*before.entries, *piece.entries]
        choices[piece.number] = Piece(piece.number, text, entries, piece.finish, before.written + piece.written)
    return {
        **head(asked, chunk=False),
        "choices": [choice(asked, each, "message") for each in choices],
        "usage": usage(saying, sum(each.written for each in choices)),
    }


def chunks(asked: Chat | Completion, saying: Saying, pieces: Iterable[Piece]) -> Iterator[Json]:
    """Yield the answer in chunks as it comes, and how many tokens it took where that was asked for."""
    common, begun, written = head(asked, chunk=True), set[int](), 0
    extra = {"usage": None} if asked.stream_options.include_usage else {}
    for piece in pieces:
        if isinstance(asked, Chat) and piece.number not in begun:
            begun.add(piece.number)
            opening = {"index": piece.number, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
            yield {**common, "choices": [opening], **extra}
        written += piece.written
        if piece.text or piece.finish:
            yield {**common, "choices": [choice(asked, piece, "delta")], **extra}
    if asked.stream_options.include_usage:
        yield {**common, "choices": [], "usage": usage(saying, written)}


def choice(asked: Chat | Completion, piece: Piece, key: str) -> Json:
    """Return one choice or what is next of it."""
    if isinstance(asked, Chat):
        message = {"content": piece.text} if key == "delta" else {"role": "assistant", "content": piece.text}
        logprobs = {"content": [told(entry, asked.top_logprobs) for entry in piece.entries]} if asked.logprobs else None
        return {"index": piece.number, key: message, "logprobs": logprobs, "finish_reason": piece.finish}
    listed = columns(piece.entries, asked.logprobs) if asked.logprobs is not None else None
    return {"index": piece.number, "text": piece.text, "logprobs": listed, "finish_reason": piece.finish}


def told(entry: Entry, top: int) -> Json:
    """Return a token as chats have it."""
    return {**one(entry.text, entry.logprob), "top_logprobs": [one(*each) for each in entry.top[:top]]}


def one(text: str, logprob: float | None) -> Json:
    """Return a token, its log-probability and its bytes, where they are those of its text."""
    return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def columns(entries: Sequence[Entry], top: int) -> Json:
    """Return tokens as completions have them: a list for each of their sides."""
    return {
        "tokens": [entry.text for entry in entries],
        "token_logprobs": [entry.logprob for entry in entries],
        "top_logprobs": [dict(entry.top) if entry.logprob is not None else None for entry in entries] if top else None,
        "text_offset": [entry.start for entry in entries],
    }
