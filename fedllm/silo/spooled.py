"""Rows that may be more than memory holds: beyond a size they lie in a file without a name and are read when asked for.

The file is gone when the process ends, however it ends.
"""

from __future__ import annotations

import json
import os
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import IO, TypeVar, overload

from fedllm.core.errors import FedllmError
from fedllm.silo.readers import Row
from fedllm.silo.smollm2 import cache_folder

SMALL = 1 << 24
"""Characters of all values of a silo's rows up to which they are kept in memory."""

T = TypeVar("T")
U = TypeVar("U")


class Spooled(Sequence[Row]):
    """Rows in a file of JSON lines, of which only the places are in memory."""

    def __init__(self, file: IO[bytes], starts: array[int]) -> None:
        self._file, self._starts = file, starts

    def __len__(self) -> int:
        return len(self._starts) - 1

    @overload
    def __getitem__(self, place: int) -> Row: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Row]: ...

    def __getitem__(self, place: int | slice) -> Row | Sequence[Row]:
        if isinstance(place, slice):
            return Picked(self, array("q", range(len(self))[place]))
        start = range(len(self))[place]
        first, after = self._starts[start], self._starts[start + 1]
        row: Row = json.loads(os.pread(self._file.fileno(), after - first, first))
        return row


class Picked(Sequence[T]):
    """Some of the items of a sequence, by their places."""

    def __init__(self, whole: Sequence[T], places: array[int]) -> None:
        self._whole, self._places = whole, places

    def __len__(self) -> int:
        return len(self._places)

    @overload
    def __getitem__(self, place: int) -> T: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[T]: ...

    def __getitem__(self, place: int | slice) -> T | Sequence[T]:
        if isinstance(place, slice):
            return Picked(self._whole, self._places[place])
        return self._whole[self._places[place]]


class Mapped(Sequence[U]):
    """What a function makes of each item of a sequence, when it is asked for."""

    def __init__(self, whole: Sequence[T], function: Callable[[T], U]) -> None:
        self._whole: Sequence[T] = whole
        self._function = function

    def __len__(self) -> int:
        return len(self._whole)

    @overload
    def __getitem__(self, place: int) -> U: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[U]: ...

    def __getitem__(self, place: int | slice) -> U | Sequence[U]:
        if isinstance(place, slice):
            return Mapped(self._whole[place], self._function)
        return self._function(self._whole[place])


def picked(rows: Sequence[T], places: Iterable[int]) -> Sequence[T]:
    """Return the rows at these places: a list of those in memory, a view of those on disk."""
    return [rows[place] for place in places] if isinstance(rows, list) else Picked(rows, array("q", places))


def spooled(rows: Iterable[Row]) -> Sequence[Row]:
    """Return the rows as a list, or from a file if they are many or long; there, what JSON has not is its text."""
    kept, size, coming = list[Row](), 0, iter(rows)
    for row in coming:
        kept.append(row)
        size += sum(len(value) if isinstance(value, str) else 8 for value in row.values())
        if size > SMALL:
            return on_disk(kept, coming)
    return kept


def at_hand(rows: Sequence[Row]) -> bool:
    """Say whether there are rows, and in memory: looking at all of them is cheap then."""
    return isinstance(rows, list) and bool(rows)


def on_disk(first: list[Row], others: Iterator[Row]) -> Spooled:
    """Write the rows into a file that has no name, and let go of them."""
    folder, starts = cache_folder(), array("q", [0])
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (it stays open as long as the rows are used)
        first.reverse()
        for row in popped(first, others):
            starts.append(starts[-1] + file.write(json.dumps(row, default=str).encode() + b"\n"))
        file.flush()
    except OSError as error:
        reason = error.strerror or str(error)
        raise FedllmError(
            f"Rows of more than {SMALL / 1e6:.0f} MB cannot be kept in {folder} ({reason}); make room there, or set "
            "FEDLLM_CACHE to another folder."
        ) from error
    return Spooled(file, starts)


def popped(backwards: list[Row], others: Iterator[Row]) -> Iterator[Row]:
    """Yield the rows of a list from its end, which empties it, then the others."""
    while backwards:
        yield backwards.pop()
    yield from others
