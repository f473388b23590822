"""The site's audit log: one line a deed, each with the hash of the line before, so that no line can be changed unseen.

A line is on disk before the deed is done. What the chain cannot show is that its last lines are
missing; whoever needs that notes the last hash elsewhere.
"""

from __future__ import annotations

import hashlib
import json
import os
import threading
from collections import deque
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from fedllm.core.errors import FedllmError
from fedllm.federation.site.disk import on_disk, sync
from fedllm.federation.site.rules import canonical

Entry: TypeAlias = dict[str, Any]

FIRST = "0" * 64
"""What stands for the hash of the line before the first."""

DAY = timedelta(hours=24)

COLUMNS = ("time", "what", "run", "round", "op", "bytes", "rule")


class Log(NamedTuple):
    """A log that holds together: its entries, and the bytes of a last line that a crash cut short."""

    entries: list[Entry]
    cut: int


def verify(path: Path) -> Log:
    """Read a log and check every line.

    Raises:
        FedllmError: with the number of the first line that was changed, or whose predecessor was.
    """
    data = path.read_bytes() if path.exists() else b""
    *lines, rest = data.split(b"\n")
    entries, before = list[Entry](), FIRST
    for number, line in enumerate(lines, 1):
        entry = entry_of(line, before)
        if entry is None:
            raise FedllmError(
                f"'{path}' was changed at line {number}: it does not follow from the lines before it; keep the file "
                "for whoever looks into it, and move it away to start a new one."
            )
        entries.append(entry)
        before = entry["hash"]
    return Log(entries, len(rest))


def entry_of(line: bytes, before: str) -> Entry | None:
    """Return the entry of a line if it follows the line with the hash `before`, else None."""
    try:
        entry = json.loads(line)
        whole = isinstance(entry, dict) and entry.get("before") == before and canonical(entry) == line
        return entry if whole and entry.get("hash") == digest(entry) and entry.get("time") else None
    except (ValueError, RecursionError):
        return None


def digest(entry: Entry) -> str:
    """Return the hash of an entry, of which its own `hash` is no part."""
    return hashlib.sha256(canonical({key: value for key, value in entry.items() if key != "hash"})).hexdigest()


def rows(entries: Sequence[Entry]) -> Iterator[tuple[str, ...]]:
    """Yield the entries for printing: `COLUMNS`, then whatever else they say."""
    for entry in entries:
        rest = {key: value for key, value in entry.items() if key not in {*COLUMNS, "before", "hash"}}
        yield (
            *(str(entry.get(key, "")) for key in COLUMNS),
            ", ".join(f"{key} {value}" for key, value in rest.items()),
        )


class Audit:
    """A log that is open for writing; threads may share it. Opening it checks it and mends a last line cut short."""

    def __init__(self, path: Path) -> None:
        log = verify(path)
        self._path, self._lock = path, threading.Lock()
        self._before = log.entries[-1]["hash"] if log.entries else FIRST
        self._recent = deque(log.entries)
        with on_disk(path):
            self._file = os.open(path, os.O_CREAT | os.O_WRONLY | os.O_APPEND, 0o600)
            self._size = os.fstat(self._file).st_size - log.cut
            os.ftruncate(self._file, self._size)
            sync(path.parent)
        if log.cut:
            # Its deed was not done: a deed waits for its line.
            self.append("healed", bytes=log.cut)

    def append(self, what: str, **said: Any) -> None:
        """Add a line and see it on disk.

        Raises:
            FedllmError: if it cannot be written; then nothing of it is left, and what it was for must not be done.
        """
        with self._lock:
            entry = {"time": datetime.now(UTC).isoformat(timespec="milliseconds"), "what": what, **said}
            entry |= {"before": self._before}
            entry |= {"hash": digest(entry)}
            line = canonical(entry) + b"\n"
            with on_disk(self._path):
                try:
                    rest = line
                    while rest:
                        rest = rest[os.write(self._file, rest) :]
                    os.fsync(self._file)
                except OSError:
                    os.ftruncate(self._file, self._size)
                    raise
            self._size += len(line)
            self._before = entry["hash"]
            self._recent.append(entry)

    def recent(self) -> list[Entry]:
        """Return the entries of the last 24 hours, also those from before a restart."""
        with self._lock:
            since = datetime.now(UTC) - DAY
            while self._recent and datetime.fromisoformat(self._recent[0]["time"]) < since:
                self._recent.popleft()
            return list(self._recent)

    def close(self) -> None:
        """Let go of the file."""
        with self._lock:
            os.close(self._file)
            self._file = -1  # The system gives the number to the next file.
