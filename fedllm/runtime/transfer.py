"""A file to a site and back in pieces: resumed where a cut link left it, given up only when nothing moves."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from threading import Event
from typing import Any

from fedllm.core.errors import Refused
from fedllm.runtime.line import Body, Head, Line, Unreachable, head_bytes
from fedllm.runtime.meter import Traffic
from fedllm.runtime.spool import Stored
from fedllm.runtime.store import on_disk

LONGEST = 15.0
"""Seconds that one call may take."""

SMALLEST, FIRST, LARGEST = 1 << 16, 1 << 20, 1 << 22
"""Bytes of a piece: so many at least, at first and at most; a slow link gets smaller ones, so that calls stay short."""

SILENT = 10.0
"""Seconds without a sign of life after which a site is shown as silent."""

TEXT = 300
"""Characters kept of a sentence that a site says."""


class Ended(Exception):
    """The exchange is over; its threads stop."""


@dataclass
class Link:
    """One site in one exchange: how it is called, the bytes that crossed, and when something last moved."""

    line: Line
    site: str
    run: str
    patience: float
    ended: Event
    tell: Callable[[str, str, Mapping[str, Any]], None]
    traffic: Traffic
    moved: float = field(default_factory=time.monotonic)
    piece: int = FIRST
    due: float | None = None
    """When the call under way must be back at the latest; None between calls."""


def ask(link: Link, head: Head, body: bytes = b"", seconds: float = LONGEST) -> tuple[Head, Body] | None:
    """Call a site once and return its answer, or None, after a pause, if it cannot be reached now.

    Raises:
        Refused: the site answers with an error.
        Unreachable: nothing has moved for longer than the link's patience.
        Aborted: the engine ended the run.
        Ended: the exchange is over.
    """
    if link.ended.is_set():
        raise Ended
    said = {**head, "run": link.run}
    link.traffic.down += head_bytes(said) + len(body)
    link.due = time.monotonic() + seconds
    try:
        answer, data = link.line.call(link.site, said, body, seconds)
    except Unreachable as problem:
        idle(link, str(problem))
        return None
    finally:
        link.due = None
    link.traffic.up += head_bytes(answer) + len(data)
    if "error" in answer:
        rule = f" (rule '{plain(answer['rule'])}')" if answer.get("rule") else ""
        raise Refused((plain(answer["error"]) or "it gives no reason") + rule)
    return answer, data


def idle(link: Link, reason: str) -> None:
    """Pause before the next try, the longer the longer nothing moved; raise `Unreachable` after the link's patience."""
    quiet = time.monotonic() - link.moved
    if quiet >= link.patience:
        raise Unreachable(f"nothing moved for {quiet:.0f} s ({plain(reason)})")
    if quiet > SILENT:
        link.tell(link.site, "silent", {})
    if link.ended.wait(min(max(quiet / 4, 0.05), 2.0, link.patience - quiet)):
        raise Ended


def send(link: Link, stored: Stored) -> None:
    """Bring a file to a site, going on from what it has; it checks the sha256 and may answer with an error."""
    # A small file goes at once; before a large one the site is asked what it has.
    have, best = (0, 0) if stored.size <= FIRST else (None, 0)
    with stored.path.open("rb") as file:
        while have is None or have < stored.size:
            file.seek(have or 0)
            body = b"" if have is None else file.read(link.piece)
            begun = time.monotonic()
            put = {"do": "put", "key": stored.key, "offset": have or 0, "size": stored.size}
            if not (answer := ask(link, put, body)):
                have, link.piece = None, max(link.piece // 2, SMALLEST)
                continue
            have = whole(answer[0], "have", stored.size)
            if have > best:
                best = have
                paced(link, time.monotonic() - begun if body else None)
                link.tell(link.site, "sending", {})
            elif body:
                idle(link, "the site keeps nothing of what it is sent")


def fetch(link: Link, key: str, size: int, path: Path) -> Stored:
    """Bring a file from a site to `path`, going on from what is there, and see that it is the one of that sha256."""
    with on_disk(path):
        have = path.stat().st_size if path.exists() else 0
        resumed = have > 0
        with path.open("a+b") as file:
            file.seek(0)
            digest = hashlib.file_digest(file, "sha256")
            while have < size:
                length, begun = min(link.piece, size - have), time.monotonic()
                if not (answer := ask(link, {"do": "get", "key": key, "offset": have, "length": length})):
                    link.piece = max(link.piece // 2, SMALLEST)
                    continue
                if whole(answer[0], "size", size) != size or len(answer[1]) != length:
                    raise Refused(f"it sends {len(answer[1])} bytes of its reply where {length} were asked for")
                file.write(answer[1])
                # While it is in the cache: read again at the end, the hash would cost twice as much.
                digest.update(answer[1])
                have += length
                paced(link, time.monotonic() - begun)
                link.tell(link.site, "fetching", {})
        if have == size and digest.hexdigest() == key:
            return Stored(path, key, size)
        path.unlink()
    if resumed:
        # What an earlier process left may have been cut by a crash of this machine.
        return fetch(link, key, size, path)
    raise Refused("the bytes of its reply are not those that it promised")


def paced(link: Link, seconds: float | None) -> None:
    """Note that something moved, and set the size of the next piece by the time this one took (None: no piece)."""
    link.moved = time.monotonic()
    if seconds is not None:
        size = link.piece * 2 if seconds < 1.0 else link.piece // 2 if seconds > 4.0 else link.piece
        link.piece = min(max(size, SMALLEST), LARGEST)


def whole(head: Head, key: str, largest: int) -> int:
    """Return a whole number from 0 to `largest` that a site says, or raise `Refused`."""
    value = head.get(key)
    if type(value) is not int or not 0 <= value <= largest:
        raise Refused(f"it answers with '{key}' {plain(value)}, expected a whole number up to {largest}")
    return value


def plain(text: object) -> str:
    """Return what a peer says as one short printable line."""
    said = text if isinstance(text, str) else repr(text) if isinstance(text, (int, float)) else type(text).__name__
    return "".join(letter if letter.isprintable() else " " for letter in said[:TEXT])
