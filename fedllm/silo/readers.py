"""One reader for each kind of file; what is broken is named with its line."""

from __future__ import annotations

import csv
import gzip
import io
import json
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.core.errors import FedllmError

Row: TypeAlias = Mapping[str, Any]
"""One example as it was read: column -> value."""

Note: TypeAlias = Callable[[str], None]
"""Counts one row, or one place in it, under what happened to it."""


def read_file(path: Path) -> list[dict[str, Any]]:
    """Read one file by its ending."""
    ending = ending_of(path)
    if ending is None:
        known = ", ".join(sorted(READERS))
        raise FedllmError(f"{path} has an unknown ending; known are {known}, and .gz after all but .parquet.")
    return READERS[ending](path)


def ending_of(path: Path) -> str | None:
    """Return the ending that names a reader, with `.gz` taken off; None when no reader knows it."""
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    ending = Path(plain).suffix
    return ending if ending in READERS and not (ending == ".parquet" and plain != name) else None


def first_line(error: BaseException) -> str:
    """Return the first line of what a library said, short enough for a sentence."""
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line[:160].rstrip(". ")


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FedllmError(f"{path} is not a whole gzip file ({error}); make or copy it again.") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _decode(data: bytes, path: Path, start: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = start + data.count(b"\n", 0, error.start)
        raise FedllmError(f"{path}, line {line}: not UTF-8; save the file as UTF-8.") from error


def _json_lines(path: Path) -> list[dict[str, Any]]:
    return list(_objects(_bytes(path), path))


def _objects(data: bytes, path: Path) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(data.split(b"\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(_decode(line, path, number))
        except (ValueError, RecursionError) as error:
            reason = first_line(error)
            raise FedllmError(f"{path}, line {number}: broken JSON ({reason}); mend or delete it.") from error
        if not isinstance(row, dict):
            raise FedllmError(f"{path}, line {number}: not a JSON object; write one {{...}} on each line.")
        yield row


def _json(path: Path) -> list[dict[str, Any]]:
    data = _bytes(path)
    if not data.lstrip().startswith(b"["):
        return list(_objects(data, path))
    try:
        rows = json.loads(_decode(data, path))
    except (ValueError, RecursionError) as error:
        line = getattr(error, "lineno", 1)
        raise FedllmError(f"{path}, line {line}: broken JSON ({first_line(error)}); mend it.") from error
    for number, row in enumerate(rows, start=1):
        if not isinstance(row, dict):
            raise FedllmError(f"{path}, item {number}: not a JSON object; make the list one of {{...}}.")
    return list(rows)


def _csv(path: Path) -> list[dict[str, Any]]:
    text = _decode(_bytes(path), path)
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    limit = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # documents are longer than the default 128 KiB
    rows: list[dict[str, Any]] = []
    try:
        header = next(reader, [])
        if len(set(header)) < len(header):
            raise FedllmError(f"{path}, line 1: a column name is there twice; rename one.")
        for fields in reader:
            if fields and len(fields) != len(header):
                raise FedllmError(
                    f"{path}, line {reader.line_num}: {len(fields)} fields where the header has "
                    f"{len(header)}; mend it, with quotes around fields that hold commas."
                )
            if fields:
                rows.append(dict(zip(header, fields, strict=True)))
    except csv.Error as error:
        raise FedllmError(f"{path}, line {reader.line_num}: broken CSV ({error}); mend it.") from error
    finally:
        csv.field_size_limit(limit)
    return rows


def _parquet(path: Path) -> list[dict[str, Any]]:
    import pyarrow
    import pyarrow.parquet

    try:
        rows: list[dict[str, Any]] = pyarrow.parquet.read_table(str(path), partitioning=None).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise FedllmError(f"{path} is not a whole Parquet file ({first_line(error)}); make it again.") from error
    return rows


def _text(path: Path) -> list[dict[str, Any]]:
    text = _decode(_bytes(path), path)
    return [{"text": text}] if text.strip() else []


READERS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
"""Ending -> reader."""
