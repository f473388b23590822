"""The narrow adapter to an engine: one call that carries a JSON head and bytes to a site and back.

An engine needs to offer no more than this. Calls are short; what takes long is begun by one call and
waited for by others.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeAlias

from fedllm.core.errors import FedllmError, Refused

Head: TypeAlias = dict[str, Any]
"""What a message says beside its bytes: a JSON object."""

Body: TypeAlias = bytes | memoryview
"""The bytes of a message; a view where they are part of what came, so that nothing is copied."""

LARGEST_HEAD = 1_000_000
"""Bytes of a head's JSON; progress and refusals are far smaller."""


class Unreachable(Exception):
    """A site that cannot be asked now: it is dead, or slow, or the link is cut; it may be asked again."""


class Aborted(FedllmError):
    """The engine ended the run: whoever catches it lets it pass."""


class Line(NamedTuple):
    """What an engine offers to the server of a run."""

    call: Callable[[str, Head, bytes, float], tuple[Head, Body]]
    """From site, head, body and the seconds to wait (15 at most) to the answer; raises `Unreachable` or `Aborted`."""
    sites: Callable[[], Sequence[str]]
    """The sites that the engine of this run knows."""
    check: Callable[[], None] = lambda: None
    """Raises `Aborted` once the engine has ended the run, for what waits outside a call."""


def encode(head: Head, body: bytes = b"") -> bytes:
    """Return a head and a body as bytes: the length of the head's JSON (4 bytes, big-endian), the JSON, the body.

    Raises:
        ValueError: if the head is larger than `LARGEST_HEAD`, or is not JSON.
    """
    text = json.dumps(head, separators=(",", ":"), allow_nan=False).encode()
    if len(text) > LARGEST_HEAD:
        raise ValueError(f"the head of a message has {len(text)} bytes, more than {LARGEST_HEAD}")
    return b"".join([len(text).to_bytes(4, "big"), text, body])


def head_bytes(head: Head) -> int:
    """Return the bytes that a head takes on the line."""
    return 4 + len(json.dumps(head, separators=(",", ":")))


def decode(data: bytes | bytearray) -> tuple[Head, Body]:
    """Return the head and the body of a message, or raise `Refused`; nothing in it is trusted."""
    size = int.from_bytes(data[:4], "big")
    if len(data) < 4 + size or len(data) < 4 or size > LARGEST_HEAD:
        raise Refused(f"its message has {len(data)} bytes and claims a head of {size}")
    try:
        head = json.loads(data[4 : 4 + size])
    except (ValueError, RecursionError) as error:
        raise Refused(f"the head of its message is not JSON ({type(error).__name__})") from error
    if not isinstance(head, dict):
        raise Refused("the head of its message is not an object")
    return head, memoryview(data)[4 + size :]
