"""Data work at the silo: a declared list of steps, each rows in, rows out, and counts of what it dropped or changed.

A step sees one row after another, so that it also works on files larger than memory.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

from fedllm.core.errors import FedllmError
from fedllm.silo.readers import Note
from fedllm.silo.sources import Row, require_columns

Columns: TypeAlias = str | Sequence[str]
"""The column, or the columns, that hold a row's text."""


class Step(NamedTuple):
    """One step of the list; `settings` are all its settings, so that what it made can be kept under their hash."""

    name: str
    run: Callable[[Iterable[Row], Note], Iterator[Row]]
    settings: Mapping[str, Any]


class Cleaned(NamedTuple):
    """The rows that are left, and counts such as `1.quality.too short`: place of the step, its name, what happened."""

    rows: list[Row]
    counts: dict[str, int]


def clean(rows: Iterable[Row], steps: Sequence[Step]) -> Cleaned:
    """Run the rows through the steps in order; `read` and `kept` are counted too."""
    counts: Counter[str] = Counter()
    left = list(cleaned(rows, steps, counts))
    return Cleaned(left, dict(counts))


def cleaned(rows: Iterable[Row], steps: Sequence[Step], counts: Counter[str]) -> Iterator[Row]:
    """Yield the rows that pass all steps as they come, and count into `counts`."""

    def note(prefix: str) -> Note:
        return lambda what: counts.update([f"{prefix}{what}"])

    def counted(stream: Iterable[Row], name: str) -> Iterator[Row]:
        counts[name] += 0
        for row in stream:
            counts[name] += 1
            yield row

    stream = counted(rows, "read")
    for place, step in enumerate(steps):
        stream = step.run(stream, note(f"{place}.{step.name}."))
    yield from counted(stream, "kept")


def text_of(row: Row, columns: Columns) -> str:
    """Return the text of a row: of several columns, one line each."""
    names = [columns] if isinstance(columns, str) else list(columns)
    require_columns([row], names, "A row to clean")
    return "\n".join(str(row[name]) for name in names)


def dropping(name: str, reason: Callable[[Row], str | None], settings: Mapping[str, Any]) -> Step:
    """Return the step that drops the rows for which there is a reason, and counts them by it."""

    def run(rows: Iterable[Row], note: Note) -> Iterator[Row]:
        for row in rows:
            why = reason(row)
            if why is None:
                yield row
            else:
                note(why)

    return Step(name, run, settings)


def utf8(text: Columns = "text", bad: Literal["skip", "refuse"] = "skip") -> Step:
    """Drop rows whose text is not Unicode that UTF-8 can write or was read wrongly (U+FFFD); or `refuse` them."""

    def reason(row: Row) -> str | None:
        said = text_of(row, text)
        try:
            said.encode()
            why = "read wrongly" if "\ufffd" in said else None
        except UnicodeEncodeError:
            why = "not UTF-8"
        if why and bad == "refuse":
            raise FedllmError(f"A row's text is {why} ({said[:40]!a}); mend it, or set bad = 'skip' to drop it.")
        return why

    return dropping("utf8", reason, {"text": text, "bad": bad})
