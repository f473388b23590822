"""Where rows come from: files, folders, a saved dataset or the Hugging Face hub; and what is held out."""

from __future__ import annotations

import hashlib
import json
import re
from array import array
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError, nearest
from fedllm.silo.readers import READERS, Row, ending_of, first_line, read_file
from fedllm.silo.spooled import picked

HUB_ID = re.compile(r"[\w.-]+/[\w.-]+(:[\w.-]+)?")
DATABASE = re.compile(r"(sqlite|postgres(ql)?)(\+\w+)?:/")
SPLIT_WORDS = ("train", "test", "validation", "valid", "dev", "eval")


def read_rows(source: str | Path, split: str = "train") -> list[dict[str, Any]]:
    """Read a file, a folder, a folder of `save_to_disk`, or a hub id `org/name[:config]`.

    `split` picks among the splits of a dataset or, in a folder, among files that have it in their name.
    """
    if DATABASE.match(str(source)):  # the address itself is not shown, since it may hold a password
        raise FedllmError("A database is given where a file was expected; give a query beside its address.")
    path = Path(source).expanduser()
    try:
        if path.is_dir():
            rows = _from_folder(path, split)
        elif path.exists():
            rows = read_file(path)
        elif HUB_ID.fullmatch(str(source)) and ending_of(path) is None:
            rows = _from_hub(str(source), split)
        else:
            raise FedllmError(f"{source} does not exist; give the path of a file or folder, or a hub id 'org/name'.")
    except OSError as error:
        raise FedllmError(f"{source} cannot be read ({first_line(error)}); check the file and its rights.") from error
    if not rows:
        raise FedllmError(f"{source} has no rows; give a source with at least one, or leave this silo out.")
    return rows


def require_columns(rows: Sequence[Row], columns: Sequence[str], where: str, first: int = 1) -> None:
    """Raise unless every row has these columns; `first` is the number of the first of them."""
    for number, row in enumerate(rows, start=first):
        for column in columns:
            if column not in row:
                known = ", ".join(map(repr, row)) or "none"
                hint = nearest(column, map(str, row))
                remedy = hint if hint.startswith("did") else "name one of these or add it to the data."
                raise FedllmError(f"{where}, row {number}, has no column {column!r} (its columns: {known}); {remedy}")


def hold_out(rows: Sequence[Row], fraction: float, seed: int = 0) -> tuple[Sequence[Row], Sequence[Row]]:
    """Split into train and test by a hash of each row, so that equal rows always land on one side.

    Neither the order of the rows nor the other rows matter, except where one side would be empty.
    """
    if not 0 < fraction < 1:
        raise FedllmError(f"The held-out fraction is {fraction}; it must be above 0 and below 1.")
    places = array("d", (_place(row, seed) for row in rows))
    low, high = min(places, default=0.0), max(places, default=0.0)
    if low == high:
        raise FedllmError(
            f"{len(rows)} rows with fewer than two different ones cannot be split into train and test; "
            "add rows or give a test file of its own."
        )
    held = bytearray(place == low or (place < fraction and place != high) for place in places)
    train = (number for number, out in enumerate(held) if not out)
    return picked(rows, train), picked(rows, (number for number, out in enumerate(held) if out))


def _place(row: Row, seed: int) -> float:
    text = json.dumps([seed, dict(row)], sort_keys=True, default=str)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") / 2**64


def is_saved_dataset(folder: Path) -> bool:
    """Say whether a folder was made by `save_to_disk` of `datasets`."""
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def _from_folder(folder: Path, split: str) -> list[dict[str, Any]]:
    if is_saved_dataset(folder):
        return _from_disk(folder, split)
    return [row for file in files_in(folder, split) for row in read_file(file)]


def files_in(folder: Path, split: str) -> list[Path]:
    """Return the files of a folder that are of a split, by their names."""
    files = sorted(file for file in folder.rglob("*") if file.is_file() and ending_of(file) is not None)
    if not files:
        raise FedllmError(f"{folder} holds no file that can be read; known endings are {', '.join(sorted(READERS))}.")
    splits = {file: set(re.split(r"[^a-z]+", str(file.relative_to(folder)).lower())) for file in files}
    chosen = [file for file in files if split in splits[file]]
    if not chosen and split == "train":
        chosen = [file for file in files if splits[file].isdisjoint(SPLIT_WORDS)]
    if not chosen:
        names = ", ".join(file.name for file in files[:5])
        raise FedllmError(f"{folder} has no file named after the split {split!r} (it holds {names}); rename one.")
    return chosen


def _from_disk(folder: Path, split: str) -> list[dict[str, Any]]:
    import datasets

    try:
        found = datasets.load_from_disk(str(folder))
    except Exception as error:  # whatever a broken Arrow file raises, the remedy is the same
        raise FedllmError(f"{folder} is not a whole saved dataset ({first_line(error)}); save it again.") from error
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
            f"Hugging Face hub ({first_line(error)}); check the name and the network, or give a local path."
        ) from error
    return [dict(row) for row in found]
