"""One request at one site: begun, waited for as long as it makes steps, and what its answers may say."""

from __future__ import annotations

import hashlib
import json
import math
import re
import time
from collections.abc import Mapping
from contextlib import suppress
from typing import Any, NamedTuple

from fedllm.core.errors import Refused
from fedllm.core.types import LATE, Request
from fedllm.runtime.line import Head
from fedllm.runtime.spool import Stored
from fedllm.runtime.transfer import LONGEST, Link, ask, plain, whole
from fedllm.runtime.wire import request_head

POLL, LONGEST_POLL = 2.0, 6.0
"""Seconds that a site may hold a `wait`, at first and once the work has gone on for a minute; what is done is answered
at once. Its answer is also its sign of life, and costs an engine some 2 kB, which over hours is no little."""


def request_id(key: str, head: Mapping[str, Any]) -> str:
    """Return what tells one request from all others: the sha256 of its tensors' file and its head, in hex."""
    said = {"key": key, "request": head}
    return hashlib.sha256(json.dumps(said, sort_keys=True, separators=(",", ":")).encode()).hexdigest()


class Packed(NamedTuple):
    """A request and the file of its tensors."""

    request: Request
    stored: Stored


def begun(link: Link, work: Packed) -> Head:
    """Begin a request whose tensors a site should have; raise `Refused` if it does not do it."""
    answer = asked(link, {"do": "begin", "key": work.stored.key, "request": request_head(work.request)}, LONGEST)
    link.moved = time.monotonic()
    return answer


def finished(link: Link, work: Packed, answer: Head, since: float, stall: float, deadline: float) -> Head:
    """Wait for the end of what was begun at the time `since`: an answer whose state is `done` or `unknown`.

    Raises:
        Refused: the work failed, made no step for `stall` seconds, or was not done after `deadline` seconds.
    """
    request, key = work.request, work.stored.key
    name, last, stepped = request_id(key, request_head(request)), (-1.0, -1.0), time.monotonic()
    while answer.get("state") == "running":
        now = time.monotonic()
        done = shown(answer.get("progress"))
        link.tell(link.site, "working", {**done, "round": request.round, "op": request.op})
        steps = (done.get("tokens", 0.0), done.get("step", 0.0))
        # It may count from the start again, where other work of the run was before it.
        if steps != last:
            last, stepped = steps, now
        if now - stepped > stall:
            raise Refused(f"its work made no step for {stall:g} s")
        if now - since >= deadline:
            raise Refused(f"{LATE}: it was still at work after {deadline:g} s, and was not waited for")
        hold = min(max(POLL, (now - since) / 10), LONGEST_POLL, since + deadline - now)
        answer = asked(link, {"do": "wait", "id": name, "seconds": hold}, hold + 3.0)
        link.moved = time.monotonic()
        if answer.get("state") == "running":
            # A site that answers without waiting shall not keep this machine busy.
            link.ended.wait(max(0.0, POLL / 4 - (link.moved - now)))
    if answer.get("state") not in ("done", "unknown"):
        raise Refused(f"it answers with the state {plain(answer.get('state'))}")
    return answer


def asked(link: Link, head: Head, seconds: float) -> Head:
    """Return a site's answer to what may be asked as often as it takes."""
    while not (answer := ask(link, head, seconds=seconds)):
        pass
    return answer[0]


def greet(link: Link) -> None:
    """Ask a site that was lost for one sign of life; raise `Unreachable` if there is none."""
    patience, link.patience = link.patience, 0.0
    try:
        asked(link, {"do": "ping"}, 3.0)
    finally:
        link.patience = patience


def promised(answer: Head, largest: int) -> tuple[str, int]:
    """Return the key and the size of the reply that a site has ready, or raise `Refused`."""
    key, size = answer.get("key"), answer.get("size")
    if not isinstance(key, str) or not re.fullmatch("[0-9a-f]{64}", key):
        raise Refused("it names no sha256 for its reply")
    if isinstance(size, int) and size > largest:
        raise Refused(f"its reply has {size} bytes, more than the {largest} that were expected")
    return key, whole(answer, "size", largest)


def shown(progress: Any) -> dict[str, float]:
    """Return the finite numbers of what a site says of its work."""
    kept = ("step", "steps", "tokens", "seconds", "loss")
    said = progress if isinstance(progress, dict) else {}
    found = {}
    for name in kept:
        with suppress(KeyError, TypeError, ValueError, OverflowError):
            found[name] = float(said[name])
    return {name: value for name, value in found.items() if math.isfinite(value)}
