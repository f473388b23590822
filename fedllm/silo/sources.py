"""Where rows come from: files, folders, a saved dataset or the Hugging Face hub; and what is held out."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import re
import sys
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.core.errors import FedllmError, nearest

Row: TypeAlias = Mapping[str, Any]
"""One example as it was read: column -> value."""

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
SPLIT_WORDS = ("train", "test", "validation", "valid", "dev", "eval")


def read_rows(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """Read a file, a folder, a folder of `save_to_disk`, or a hub id `org/name[:config]`.

    `split` picks among the splits of a dataset or, in a folder, among files that have it in their name.
    """
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            rows = _from_folder(path, split)
        elif path.exists():
            rows = _from_file(path)
        elif HUB_ID.fullmatch(str(source)) and _ending(path) is None:
            rows = _from_hub(str(source), split)
        else:
            raise FedllmError(f"{source} does not exist; give the path of a file or folder, or a hub id 'org/name'.")
    except OSError as error:
        raise FedllmError(f"{source} cannot be read ({_first_line(error)}); check the file and its rights.") from error
    if not rows:
        raise FedllmError(f"{source} has no rows; give a source with at least one, or leave this silo out.")
    return rows


def require_columns(rows: Sequence[Row], columns: Sequence[str], where: str) -> None:
    """Raise unless every row has these columns."""
    for number, row in enumerate(rows, start=1):
        for column in columns:
            if column not in row:
                known = ", ".join(map(repr, row)) or "none"
                hint = nearest(column, map(str, row))
                remedy = hint if hint.startswith("did") else "name one of these or add it to the data."
                raise FedllmError(f"{where}, row {number}, has no column {column!r} (its columns: {known}); {remedy}")


def hold_out(rows: Sequence[Row], fraction: float, seed: int = 0) -> tuple[list[Row], list[Row]]:
    """Split into train and test by a hash of each row, so that equal rows always land on one side.

    Neither the order of the rows nor the other rows matter, except where one side would be empty.
    """
    if not 0 < fraction < 1:
        raise FedllmError(f"The held-out fraction is {fraction}; it must be above 0 and below 1.")
    places = [_place(row, seed) for row in rows]
    low, high = min(places, default=0.0), max(places, default=0.0)
    if low == high:
        raise FedllmError(
            f"{len(rows)} rows with fewer than two different ones cannot be split into train and test; "
            "add rows or give a test file of its own."
        )
    held = [place == low or (place < fraction and place != high) for place in places]
    train = [row for row, out in zip(rows, held, strict=True) if not out]
    return train, [row for row, out in zip(rows, held, strict=True) if out]


def _place(row: Row, seed: int) -> float:
    text = json.dumps([seed, dict(row)], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def _from_file(path: Path) -> list[dict[str, Any]]:
    ending = _ending(path)
    if ending is None:
        known = ", ".join(sorted(READERS))
        raise FedllmError(f"{path} has an unknown ending; known are {known}, and .gz after all but .parquet.")
    return READERS[ending](path)


def _from_folder(folder: Path, split: str) -> list[dict[str, Any]]:
    if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
        return _from_disk(folder, split)
    files = sorted(file for file in folder.rglob("*") if file.is_file() and _ending(file) is not None)
    if not files:
        raise FedllmError(f"{folder} holds no file that can be read; known endings are {', '.join(sorted(READERS))}.")
    splits = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    chosen = [file for file in files if split in splits[file]]
    if not chosen and split == "train":
        chosen = [file for file in files if splits[file].isdisjoint(SPLIT_WORDS)]
    if not chosen:
        names = ", ".join(file.name for file in files[:5])
        raise FedllmError(f"{folder} has no file named after the split {split!r} (it holds {names}); rename one.")
    return [row for file in chosen for row in _from_file(file)]


def _from_disk(folder: Path, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a broken Arrow file raises, the remedy is the same
        raise FedllmError(f"{folder} is not a whole saved dataset ({_first_line(error)}); save it again.") from error
    if isinstance(found, datasets.DatasetDict):
        if split not in found:
            raise FedllmError(f"{folder} has no split {split!r}; {nearest(split, found)}")
        found = found[split]
    return [dict(row) for row in found]


def _from_hub(name: str, split: str) -> list[dict[str, Any]]:
    import datasets

    repository, _, config = name.partition(":")
    try:
        found = datasets.load_dataset(repository, config or None, split=split)
    except Exception as error:  # the hub's libraries raise many kinds; the user can do the same about each
        raise FedllmError(
            f"{name} is neither a file or folder here nor could its split {split!r} be read from the "
            f"Hugging Face hub ({_first_line(error)}); check the name and the network, or give a local path."
        ) from error
    return [dict(row) for row in found]


def _ending(path: Path) -> str | None:
    name = path.name.lower()
    plain = name.removesuffix(".gz")
    ending = Path(plain).suffix
    return ending if ending in READERS and not (ending == ".parquet" and plain != name) else None


def _bytes(path: Path) -> bytes:
    data = path.read_bytes()
    if path.name.lower().endswith(".gz"):
        try:
            data = gzip.decompress(data)
        except (EOFError, zlib.error, gzip.BadGzipFile) as error:
            raise FedllmError(f"{path} is not a whole gzip file ({error}); make or copy it again.") from error
    return data.removeprefix(b"\xef\xbb\xbf")


def _decode(data: bytes, path: Path, first_line: int = 1) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = first_line + data.count(b"\n", 0, error.start)
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
            reason = _first_line(error)
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
        raise FedllmError(f"{path}, line {line}: broken JSON ({_first_line(error)}); mend it.") from error
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
        raise FedllmError(f"{path} is not a whole Parquet file ({_first_line(error)}); make it again.") from error
    return rows


def _text(path: Path) -> list[dict[str, Any]]:
    text = _decode(_bytes(path), path)
    return [{"text": text}] if text.strip() else []


def _first_line(error: BaseException) -> str:
    line = (str(error).strip() or type(error).__name__).splitlines()[0]
    return line[:160].rstrip(". ")


READERS: Mapping[str, Callable[[Path], list[dict[str, Any]]]] = {
    ".jsonl": _json_lines,
    ".json": _json,
    ".csv": _csv,
    ".parquet": _parquet,
    ".txt": _text,
}
"""Ending -> reader."""
