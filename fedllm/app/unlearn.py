"""Forget a silo, or rows of one, of a finished run: its rounds are replayed without them, as a run of its own.

Exact: from the last checkpoint before the silo first took part, or from the start, the rounds run again without it.
What the others send depends on the model that they were sent, so nothing else would be a model that never learned from
it; law: the result has the bits of a run whose recipe leaves the same out. Calibrated (FedEraser, Liu et al. 2021):
fewer rounds with fewer steps each, in which the updates have the lengths recorded in the run; it is an approximation.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.app.catalog import make
from fedllm.app.config import Recipe, Without, read_recipe, read_toml, write_recipe
from fedllm.app.data import open_named
from fedllm.app.privacy import is_private
from fedllm.app.progress import Ui
from fedllm.app.rows import rows_of
from fedllm.app.run import resume, run
from fedllm.core.errors import FedllmError, nearest
from fedllm.exchange.availability import AWAY
from fedllm.exchange.calibrate import NORM
from fedllm.runtime.store import Event, new_run, read_events, write_text
from fedllm.silo.cleaning import cleaned
from fedllm.silo.columns import renaming
from fedllm.silo.forget import row_key


class Wish(NamedTuple):
    """What is to be forgotten, and how."""

    silo: str
    rows: Path | None = None
    """A file with rows of the silo, if not all of it."""
    calibrated: bool = False
    ratio: float = 0.5
    """Calibrated: share of a round's local steps that a replayed one takes."""
    interval: int = 2
    """Calibrated: rounds for which one is replayed."""


class Past(NamedTuple):
    """A finished run."""

    folder: Path
    recipe: Recipe
    events: Sequence[Event]

    @property
    def rounds(self) -> list[Event]:
        """Return the events of its rounds."""
        return [event for event in self.events if event["event"] == "round"]


class Replay(NamedTuple):
    """Where the replay begins and what it leaves out."""

    folder: Path
    recipe: Recipe
    checkpoint: Path | None
    first: int
    """The first round, counted from 1, that is replayed."""
    keys: list[str]


def unlearn(folder: Path, wish: Wish, out: Path | None = None, ui: Ui | None = None) -> Replay:
    """Replay a run without what is to be forgotten, and return what was replayed.

    The new run is a folder of its own, by default beside the old one, which stays as it is. Stopped at any instant, the
    same call goes on.

    Raises `FedllmError` for whatever does not fit, before anything is trained.
    """
    past = finished(folder)
    require_forgettable(past, wish)
    replay = replay_of(past, wish, out)
    if begun(replay):
        resume(replay.folder, ui)
    elif replay.recipe.scratch:
        # The tokenizer was learned from what is to be forgotten, too.
        run(replay.recipe, replay.folder, ui=ui)
    else:
        place(replay, past)
        resume(replay.folder, ui)
    return replay


def finished(folder: Path) -> Past:
    """Open a run that has come to its end."""
    if not (folder / "recipe.toml").is_file():
        raise FedllmError(f"There is no run in '{folder}'; give the folder that `fedllm run` made.")
    past = Past(folder, read_recipe(read_toml(folder / "recipe.toml")), read_events(folder))
    if (folder / "run.json").exists():
        raise FedllmError(
            f"'{folder}' is a run between machines, whose texts are not here; submit its recipe again with "
            '[without] silos = ["NAME"].'
        )
    if not any(event["event"] == "done" for event in past.events):
        raise FedllmError(f"The run '{folder}' is not finished; `fedllm resume {folder}` first, then forget.")
    return past


def require_forgettable(past: Past, wish: Wish) -> None:
    """Raise where there is nothing that could be forgotten in this way."""
    held = next(event for event in past.events if event["event"] == "start")["silos"]
    if wish.silo not in held:
        raise FedllmError(f"The run '{past.folder}' has no silo '{wish.silo}'; {nearest(wish.silo, held)}")
    if len(held) == 1 and wish.rows is None:
        raise FedllmError(
            f"'{wish.silo}' is the only silo of '{past.folder}', so nothing would be left; delete the run's folder."
        )
    if is_private(past.recipe):
        raise FedllmError(
            f"'{past.folder}' adds noise, and a replay would spend the other silos' epsilon a second time; run the "
            "recipe anew without the silo, and count both runs."
        )
    if not 0 < wish.ratio <= 1 or wish.interval < 1:
        raise FedllmError(
            f"--ratio is {wish.ratio:g} and --interval {wish.interval}; use a ratio above 0 and at most 1, and an "
            "interval of at least 1."
        )


def replay_of(past: Past, wish: Wish, out: Path | None) -> Replay:
    """Return the run that leaves out what is to be forgotten, and where it can begin."""
    old, events = past.recipe, past.rounds
    asked = [
        event["round"] for event in events if wish.silo in event["asked"] and event["dropped"].get(wish.silo) != AWAY
    ]
    if not asked:
        raise FedllmError(f"'{wish.silo}' took part in no round of '{past.folder}', so nothing was learned from it.")
    keys = keys_of(old, wish) if wish.rows else []
    # Before the first round there is more that depends on all silos: a tokenizer, who keeps what several have.
    whole = bool(old.scratch or old.duplicates or old.algorithm["name"] != "averaging")
    checkpoint = None if whole else last_before(past.folder, min(asked))
    first = 1 + (number_of(checkpoint) if checkpoint else 0)
    silos = [*old.without.silos, *([] if keys else [wish.silo])]
    rows = {**old.without.rows, **({wish.silo: sorted({*old.without.rows.get(wish.silo, []), *keys})} if keys else {})}
    new = old.model_copy(
        update={
            "name": f"{old.name}-without-{'rows-of-' if keys else ''}{wish.silo}",
            "without": Without(silos=silos, rows=rows, norms=old.without.norms),
            # What the others reach alone has nothing to do with it.
            "evaluate": old.evaluate.model_copy(update={"alone": False, "pooled": False}),
            **{
                table: here.model_copy(update={"silos": {n: v for n, v in here.silos.items() if n not in silos}})
                for table in ("availability", "links")
                if (here := getattr(old, table)) is not None
            },
        }
    )
    if wish.calibrated:
        new = with_calibration(new, events, wish, first)
    folder = out or past.folder.with_name(f"{past.folder.name}-without-{'rows-of-' if keys else ''}{wish.silo}")
    return Replay(folder, new, checkpoint, first, keys)


def with_calibration(new: Recipe, events: Sequence[Event], wish: Wish, first: int) -> Recipe:
    """Return the recipe of a replay that takes fewer rounds and steps, in which updates have their recorded lengths."""
    recorded = {event["round"]: event.get(NORM, {}) for event in events}
    if not any(recorded.values()):
        raise FedllmError(
            "The run kept no norms of the updates, which calibrated forgetting needs; leave out --calibrated, or set "
            "keep.norms = true before the next run."
        )
    if wish.interval > 1 and new.select["name"] != "everyone":
        raise FedllmError(
            f"select.name is '{new.select['name']}', so other silos take part in each round; use --interval 1, which "
            "replays every round, or leave out --calibrated."
        )
    replayed = list(range(first, len(events) + 1, wish.interval))
    names = sorted({name for norms in recorded.values() for name in norms} - set(new.without.silos))
    norms = {
        name: [*[0.0] * (first - 1), *(float(recorded[number].get(name, 0.0)) for number in replayed)] for name in names
    }
    part = dict(new.client)
    if part.get("epochs") is not None:
        part["epochs"] = part["epochs"] * wish.ratio
    else:
        part["steps"] = max(1, math.ceil(int(part.get("steps") or 10) * wish.ratio))
    without = new.without.model_copy(update={"norms": norms})
    rounds = first - 1 + len(replayed)
    # Who was there in a replayed round is who has a norm in it.
    return new.model_copy(update={"client": part, "without": without, "rounds": rounds, "availability": None})


def keys_of(recipe: Recipe, wish: Wish) -> list[str]:
    """Return the hashes of the rows in a file, which must all be rows of the silo as it learned from them."""
    assert wish.rows is not None
    columns = recipe.silos[wish.silo].columns if wish.silo in recipe.silos else {}
    found = rows_of(str(wish.rows.absolute()), Path(), "refuse", lambda what: None)
    named = renaming(found, columns, str(wish.rows)) if columns else found
    steps = [make("cleaning", part) for part in recipe.cleaning]
    keys = [row_key(row) for row in (cleaned(named, steps, Counter()) if steps else named)]
    shard = open_named(recipe)[wish.silo]
    own = {row_key(row) for rows in (shard.train, shard.test) for row in rows}
    if not keys:
        raise FedllmError(f"'{wish.rows}' has no rows; give the rows that are to be forgotten, in the silo's own form.")
    if odd := [place for place, key in enumerate(keys, 1) if key not in own]:
        raise FedllmError(
            f"{len(odd)} of the {len(keys)} rows in '{wish.rows}' are none that silo '{wish.silo}' learned from "
            f"(first: row {odd[0]}); give them as the silo has them, all columns alike, or take them out of the file."
        )
    return keys


def last_before(folder: Path, first: int) -> Path | None:
    """Return the last checkpoint that is older than a round, counted from 1, if the run kept one."""
    kept = [path for path in (folder / "checkpoints").glob("round-*.safetensors") if number_of(path) < first]
    return max(kept, key=number_of, default=None)


def number_of(checkpoint: Path) -> int:
    """Return after how many rounds a checkpoint was written."""
    return int(checkpoint.stem.removeprefix("round-"))


def begun(replay: Replay) -> bool:
    """Say whether the same replay was begun before."""
    path = replay.folder / "recipe.toml"
    if not path.exists():
        return False
    there = read_recipe(read_toml(path))
    # A model from nothing is made inside its run's folder.
    alike = there.model_copy(update={"model": replay.recipe.model}) if there.scratch else there
    return write_recipe(alike) == write_recipe(replay.recipe)


def place(replay: Replay, past: Past) -> None:
    """Make the new run's folder, whole or not at all, with what the old one knew before the first replayed round."""
    folder = replay.folder
    if folder.exists():
        new_run(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    (beside / "checkpoints").mkdir(parents=True)
    try:
        write_text(beside / "recipe.toml", write_recipe(replay.recipe))
        if replay.checkpoint:
            shutil.copyfile(replay.checkpoint, beside / "checkpoints" / replay.checkpoint.name)
        gone = set(replay.recipe.without.silos)
        before = [untold(event, gone) for event in past.rounds if event["round"] < replay.first]
        write_text(beside / "events.jsonl", "".join(f"{json.dumps(event)}\n" for event in before))
        beside.rename(folder)
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def untold(told: Any, gone: set[str]) -> Any:
    """Return what was told without the silos that are gone."""
    if isinstance(told, Mapping):
        return {key: untold(value, gone) for key, value in told.items() if key not in gone}
    if isinstance(told, list):
        return [untold(value, gone) for value in told if not (isinstance(value, str) and value in gone)]
    return told
