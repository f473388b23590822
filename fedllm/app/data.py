"""Open the silos of a recipe: their rows, their examples, and who holds what."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Collection, Iterable
from functools import lru_cache
from itertools import chain
from pathlib import Path
from urllib.parse import quote

import torch

from fedllm.app.catalog import make
from fedllm.app.config import Data, Recipe, SiloFiles
from fedllm.app.duplicates import apart
from fedllm.app.rows import NOWHERE, Rows, Shard, counted, named_rows, noting, rows_of, some
from fedllm.core.errors import FedllmError, nearest
from fedllm.core.seeds import generator
from fedllm.core.types import Dataset
from fedllm.silo.canaries import SENTENCE, Canary, canaries_in, planted_rows
from fedllm.silo.cleaning import cleaned
from fedllm.silo.examples import Joined, spread
from fedllm.silo.forget import forgetting
from fedllm.silo.leaks import strings
from fedllm.silo.questions import Asking
from fedllm.silo.readers import Row
from fedllm.silo.sources import hold_out
from fedllm.silo.spooled import spooled
from fedllm.silo.tasks import Task


def anchored(recipe: Recipe) -> Recipe:
    """Return the recipe with its folders absolute, so that its run is the same seen from any folder."""
    model = Path(recipe.model).expanduser()
    data = recipe.data.model_copy(update={"root": str(Path(recipe.data.root).expanduser().absolute())})
    return recipe.model_copy(update={"data": data, "model": str(model.absolute()) if model.is_dir() else recipe.model})


def open_shards(recipe: Recipe, keep: bool = True) -> dict[str, Shard]:
    """Read all silos of a recipe but those that it leaves out, each with text to learn from and text held out.

    Canaries that are made now are written to their silo's file, unless `keep` is false.
    """
    return {name: shard for name, shard in open_named(recipe, keep).items() if name not in recipe.without.silos}


def open_named(recipe: Recipe, keep: bool = True) -> dict[str, Shard]:
    """Read all silos of a recipe; of those that it leaves out there is the name, and their files are not opened."""
    root, gone = Path(recipe.data.root), set(recipe.without.silos)
    shards = opened(recipe, root, gone)
    if odd := sorted((gone | recipe.without.rows.keys()) - shards.keys()):
        raise FedllmError(f"without: there is no silo '{odd[0]}'; {nearest(odd[0], shards)}")
    if gone >= shards.keys():
        raise FedllmError("without.silos leaves out all silos, so nobody is left to learn; take one of them out.")
    there = {name: planted(name, shard, recipe, keep) for name, shard in shards.items() if name not in gone}
    left = apart({name: forgetful(name, shard, recipe) for name, shard in there.items()}, recipe)
    return {name: left.get(name, shard) for name, shard in shards.items()}


def opened(recipe: Recipe, root: Path, gone: Collection[str]) -> dict[str, Shard]:
    """Read the silos of a recipe; of those that are gone nothing is read, or kept."""
    bad = recipe.data.not_utf8
    if bool(recipe.silos) == bool(recipe.partition):
        raise FedllmError(
            "A recipe needs either [silos] (name = file) or [partition] (one source, split into silos); "
            "for example --set silos.hospital_a=a.jsonl --set silos.hospital_b=b.jsonl."
        )
    if recipe.partition:
        settings = dict(recipe.partition)
        if "source" not in settings:
            raise FedllmError("[partition] has no 'source'; name the file or folder that is to be split.")
        source, counts = settings.pop("source"), Counter[str]()
        rows = some(rows_of(source, root, bad, noting(counts)), source, counts)
        parts = make("partition", settings, rows, seed=recipe.seed)
        # Before the split they are no silo's; they are told of the first.
        each = {name: Counter[str]() for name in parts} | {next(iter(parts)): counts}
        return {
            name: NOWHERE if name in gone else split(name, part, None, recipe, Counter(each[name]))
            for name, part in parts.items()
        }
    return {
        name: NOWHERE if name in gone else open_silo(name, files, recipe, root) for name, files in recipe.silos.items()
    }


def open_silo(name: str, files: SiloFiles, recipe: Recipe, root: Path) -> Shard:
    """Read one silo's text: its files or its database, under the recipe's names of columns."""
    counts = Counter[str]()

    def rows(source: str, query: str | None) -> Iterable[Row]:
        return named_rows(name, source, query, files, root, recipe.data.not_utf8, noting(counts))

    test_query = files.test_query if files.test or files.test_query else None
    test = None
    if files.test or test_query:
        test = some(rows(files.test or files.train, test_query), files.test or files.train, counts)
    shard = split(name, rows(files.train, files.query), test, recipe, counts, files.train)
    return shard._replace(templates=read_templates(root / files.templates)) if files.templates else shard


def read_templates(path: Path) -> list[str]:
    """Read templates out of a text file, where a line of three dashes stands between two of them."""
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise FedllmError(f"The templates '{path}' cannot be read ({error}); give a text file.") from error
    return [each for part in re.split(r"(?m)^---[ \t]*\n", text) if (each := part.strip("\n"))]


def split(
    name: str, rows: Iterable[Row], test: Rows | None, recipe: Recipe, counts: Counter[str], source: str = ""
) -> Shard:
    """Clean a silo's rows, hold out test rows where it gives none, and keep to the limits."""
    data, steps = recipe.data, [make("cleaning", part) for part in recipe.cleaning]
    kept = spooled(cleaned(rows, steps, counts) if steps else rows)
    if not kept and counts["read"]:
        raise FedllmError(f"silos.{name}: cleaning left no row ({counted(counts)}); take a step out of [[cleaning]].")
    if not kept:
        why = f" ({counted(counts)})" if counts else ""
        what = f"{source} has no rows{why}" if source and "://" not in source else f"The silo '{name}' is empty{why}"
        raise FedllmError(f"{what}; give a source with at least one, or leave this silo out.")
    train: Rows = kept
    if test is None:
        try:
            train, test = hold_out(kept, data.held_out, recipe.seed)
        except FedllmError as error:
            raise FedllmError(f"silos.{name}: {error}") from error
    train, test = limited(train, data.limit_train, data, recipe.seed), limited(test, data.limit_test, data, recipe.seed)
    return Shard(train, test, dict(counts))


def planted(name: str, shard: Shard, recipe: Recipe, keep: bool) -> Shard:
    """Return a silo with its canaries among the rows to learn from."""
    if recipe.canaries is None:
        return shard
    rows = planted_rows(canaries_of(name, recipe, keep), recipe.canaries.repeat, canary_columns(recipe))
    counts = {**shard.cleaned, f"{len(recipe.cleaning)}.canaries.made": recipe.canaries.count}
    return shard._replace(train=spooled(chain(shard.train, rows)), cleaned=counts)


def forgetful(name: str, shard: Shard, recipe: Recipe) -> Shard:
    """Return a silo without the rows of it that are to be forgotten."""
    keys = recipe.without.rows.get(name)
    if not keys:
        return shard
    train, test = forgetting(shard.train, keys), forgetting(shard.test, keys)
    if not train or not test:
        raise FedllmError(
            f"without.rows leaves silo '{name}' no row to {'learn from' if not train else 'test with'}; leave out "
            "the whole silo by without.silos."
        )
    return shard._replace(train=train, test=test)


def canaries_of(name: str, recipe: Recipe, keep: bool = True) -> list[Canary]:
    """Return the canaries of a silo of this machine, from its own folder."""
    if recipe.canaries is None:
        return []
    folder = Path(recipe.data.root) / Path(recipe.canaries.folder).expanduser()
    return canaries_in(folder / f"{quote(name, safe='')}.jsonl", recipe.canaries.count, keep)


def canary_columns(recipe: Recipe) -> dict[str, str]:
    """Return what a canary's row is made of, by the recipe's task."""
    task = recipe.task
    if task["name"] == "instruct":
        columns = {str(task.get("prompt", "prompt")): SENTENCE.prompt}
        return {**columns, str(task.get("response", "response")): SENTENCE.response}
    if task["name"] == "causal":
        return {str(task.get("text", "text")): SENTENCE.response}
    raise FedllmError(f"[canaries] tells secrets in text, and task '{task['name']}' writes none; take the table out.")


def limited(rows: Rows, limit: int, data: Data, seed: int) -> Rows:
    """Return at most so many rows (0: all), in their order."""
    if not limit or len(rows) <= limit or data.limit_by == "first":
        return rows[: limit or None]
    drawn = torch.randperm(len(rows), generator=generator(seed, "limit"))[:limit]
    return [rows[place] for place in sorted(drawn.tolist())]


class Silos:
    """The silos of a run: examples are made when a silo is first asked and kept for the next round."""

    def __init__(self, shards: dict[str, Shard], task: Task, tested: int = 0, asking: Asking | None = None) -> None:
        """Take the silos' rows; of their held-out examples at most `tested` are used (0: all).

        With `asking` a silo also has its rows as `questions`, `tests` and, word for word, `texts`.
        """
        self.shards, self.task, self.tested, self.asking = shards, task, tested, asking
        self.names = list(shards)
        self.skipped: dict[str, int] = {}
        self._examples = lru_cache(maxsize=256)(self._make)

    def examples(self, name: str) -> Dataset:
        """Return a silo's examples by split."""
        return self._examples(name)

    def replace(self, name: str, shard: Shard) -> None:
        """Let a silo have other rows."""
        self.shards[name] = shard
        self._examples.cache_clear()

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
        held_out = spread(test.examples, self.tested) if self.tested else test.examples
        return {"train": train.examples, "test": held_out, **self._questions(name)}

    def _questions(self, name: str) -> Dataset:
        if self.asking is None:
            return {}
        shard = self.shards[name]
        return {
            "questions": self.asking.read(shard.train, f"silos.{name}"),
            "tests": self.asking.read(shard.test, f"silos.{name} (held out)"),
            "templates": shard.templates,
            "texts": [text for rows in (shard.train, shard.test) for row in rows for text in strings(row)],
        }

    def pooled(self) -> Dataset:
        """Return all silos' examples in one place."""
        return {part: Joined([self.examples(name)[part] for name in self.names]) for part in ("train", "test")}
