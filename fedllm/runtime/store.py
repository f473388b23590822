"""A run is one folder; whatever instant it is killed at, it resumes with the same bits.

A checkpoint is one safetensors file with the server's state and what the nodes remember, written
beside and renamed. A round's event line is on disk before its checkpoint is, so after a kill there
may be one line too many, never one too few: `trim_events` takes it away.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.room import room_for
from fedllm.core.tensors import below, under
from fedllm.core.types import State, Tensors

KEPT = 2
"""Checkpoints kept: the last, and the one before it."""

Event = Mapping[str, Any]


class Checkpoint(NamedTuple):
    """All that a run needs to go on."""

    state: State
    memory: dict[str, Tensors]


def new_run(folder: Path) -> None:
    """Make a run's folder, which must not exist or be empty."""
    if folder.exists() and any(folder.iterdir()):
        raise FedllmError(
            f"The run folder '{folder}' exists already; go on with `fedllm resume {folder}` or choose another --out."
        )
    folder.mkdir(parents=True, exist_ok=True)


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the run alone; the lock goes with the process, however it ends."""
    if not folder.is_dir():
        raise FedllmError(f"There is no run folder '{folder}'; `fedllm run RECIPE` makes one.")
    try:
        with FileLock(folder / "lock", timeout=0):
            yield
    except Timeout:
        raise FedllmError(f"Another process works on the run '{folder}'; wait for it or stop it first.") from None


def save_checkpoint(folder: Path, checkpoint: Checkpoint, most: int = KEPT) -> None:
    """Write a checkpoint by rename, then drop all but the last `most` (0: none)."""
    state = checkpoint.state
    tensors = {
        **under("params", state.params),
        **under("optimiser", state.optimiser),
        **under("transforms", state.transforms),
    }
    for number, kept in enumerate(checkpoint.memory.values()):
        tensors |= under(f"memory.{number}", kept)
    # A file gives its tensors by name; sums over all of them need the order they had, to the last bit.
    metadata = {
        "round": str(state.round),
        "silos": json.dumps(list(checkpoint.memory)),
        "names": json.dumps(list(tensors)),
    }
    place = folder / "checkpoints"
    place.mkdir(exist_ok=True)
    with replacing(place / f"round-{state.round:06d}.safetensors") as beside:
        save_file({name: value.detach().cpu().contiguous() for name, value in tensors.items()}, beside, metadata)
    for old in sorted(place.glob("round-*.safetensors"))[:-most]:
        old.unlink()


def load_checkpoint(folder: Path) -> Checkpoint | None:
    """Return the last whole checkpoint of a run, or None if it has none yet."""
    for path in sorted((folder / "checkpoints").glob("round-*.safetensors"), reverse=True):
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata()
                # Copies, since tensors that lie in a file are aligned otherwise, and sums then differ.
                names = json.loads(metadata["names"])
                tensors: dict[str, Tensor] = {name: copied(file.get_tensor(name)) for name in names}
        except (SafetensorError, OSError) as error:
            raise FedllmError(
                f"The checkpoint '{path}' cannot be read ({error}); delete it to go on from the one before."
            ) from error
        state = State(
            int(metadata["round"]),
            below("params", tensors),
            below("optimiser", tensors),
            below("transforms", tensors),
        )
        silos = json.loads(metadata["silos"])
        memory: dict[str, Tensors] = {name: below(f"memory.{number}", tensors) for number, name in enumerate(silos)}
        return Checkpoint(state, memory)
    return None


def copied(value: Tensor) -> Tensor:
    """Return a copy in memory of its own."""
    return room_for(value).copy_(value)


def require_same(folder: Path, kept: State, fresh: State) -> None:
    """Raise unless a checkpoint has the parameters and the optimiser's state of the run that a recipe makes afresh."""
    for what, own, known in (
        ("model or trainable", kept.params, fresh.params),
        ("optimiser", kept.optimiser, fresh.optimiser),
    ):
        shapes = [{name: tuple(value.shape) for name, value in each.items()} for each in (own, known)]
        if shapes[0] != shapes[1]:
            odd = sorted(dict(shapes[0].items() ^ shapes[1].items()))[0]
            raise FedllmError(
                f"The checkpoint in '{folder}' is of another {what} than its recipe.toml says (first at '{odd}'); put "
                "the recipe back as it was, or begin a new run."
            )


def read_events(folder: Path) -> list[Event]:
    """Return the whole lines of a run's events; what a kill left of the last one is not a line."""
    path = folder / "events.jsonl"
    lines = path.read_bytes().split(b"\n")[:-1] if path.exists() else []
    return [json.loads(line) for line in lines]


def append_event(folder: Path, event: Event) -> None:
    """Add one line to the run's events and see it safely on disk."""
    path = folder / "events.jsonl"
    with on_disk(path), path.open("ab") as file:
        file.write(json.dumps(event).encode() + b"\n")
        file.flush()
        os.fsync(file.fileno())


def trim_events(folder: Path, rounds: int) -> list[Event]:
    """Drop what was said of rounds after the last checkpoint, and a line cut short; return the rest."""
    events = [event for event in read_events(folder) if event.get("round", 0) <= rounds]
    write_text(folder / "events.jsonl", "".join(json.dumps(event) + "\n" for event in events))
    return events


def write_text(path: Path, text: str) -> None:
    """Write a file by rename, so that it is there whole or not at all."""
    with replacing(path) as beside:
        beside.write_text(text, encoding="utf-8")


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Yield a file to write beside `path`; it takes the place of `path` when it is safely on disk."""
    beside = path.with_name(f".{path.name}.new")
    with on_disk(path):
        try:
            yield beside
            with beside.open("rb") as file:
                os.fsync(file.fileno())
            beside.replace(path)
        finally:
            beside.unlink(missing_ok=True)


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into one sentence."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise FedllmError(
            f"'{path}' cannot be written ({reason}); make room, then resume the run: it goes on from its last round."
        ) from error
