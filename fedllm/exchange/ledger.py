"""The privacy ledger of a run: one line for every time that noised text was looked at, on disk before anybody sees it.

A line that is there already is not written again: work that is repeated after a kill draws the same noise and tells
nothing new. What is repeated on other replies draws other noise, has another mark, and is a line of its own.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, TypeAlias

from fedllm.core.errors import FedllmError
from fedllm.exchange.accounting import Epsilons, Mechanism, epsilons

Unit: TypeAlias = Literal["silo", "record"]

NAME = "ledger.jsonl"


class Entry(NamedTuple):
    """One look at the text of one silo, or of all where `silo` is empty."""

    round: int
    what: str
    """`training`, `clipping statistic`, `tokenizer counts`..."""
    unit: Unit
    """What the noise hides: a whole `silo`, or a `record` of one."""
    silo: str
    mark: str
    mechanism: Mechanism


def read_ledger(path: Path) -> list[Entry]:
    """Return the entries of a ledger; a line that a kill cut short is none."""
    data = path.read_bytes() if path.exists() else b""
    try:
        lines = [json.loads(line) for line in data.split(b"\n")[:-1]]
        return [Entry(**{**line, "mechanism": Mechanism(**line["mechanism"])}) for line in lines]
    except (ValueError, TypeError, KeyError) as error:
        raise FedllmError(
            f"The privacy ledger '{path}' has a line that is not one of its own ({error}); without it no epsilon can "
            "be stated, so bring back the file as it was."
        ) from error


def note(path: Path, entries: Iterable[Entry]) -> list[Entry]:
    """Add those entries that are not there yet, see them on disk, and return the whole ledger."""
    known = read_ledger(path)
    new = [entry for entry in dict.fromkeys(entries) if entry not in set(known)]
    if new:
        text = "".join(json.dumps({**e._asdict(), "mechanism": e.mechanism._asdict()}) + "\n" for e in new)
        whole = len(path.read_bytes().rpartition(b"\n")[0]) + 1 if known else 0
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            handle = os.open(path, os.O_CREAT | os.O_WRONLY, 0o600)
            try:
                os.ftruncate(handle, whole)
                os.pwrite(handle, text.encode(), whole)
                os.fsync(handle)
            finally:
                os.close(handle)
            # A file that is new is on disk when its folder is.
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise FedllmError(
                f"The privacy ledger '{path}' cannot be written ({error.strerror}), and nothing is handed on without "
                "it; make room, then `fedllm resume` goes on from the last round kept."
            ) from error
    return [*known, *new]


def spent(ledger: Sequence[Entry], unit: Unit, delta: float) -> dict[str, Epsilons]:
    """Return what was spent of each silo whose name stands in the ledger, or of any one under the empty name.

    What hides a record counts for records; what hides a silo hides its records with it, but is not counted there: the
    two units stand side by side.
    """
    own = [entry for entry in ledger if entry.unit == unit]
    names = dict.fromkeys(entry.silo for entry in own if entry.silo) or dict.fromkeys([""] if own else [])
    return {name: epsilons([entry.mechanism for entry in own if entry.silo in ("", name)], delta) for name in names}
