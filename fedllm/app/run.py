"""A run from start to end: base, rounds, the baselines, the results; resumable at every point."""

from __future__ import annotations

import os
import platform
import resource
import shutil
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import fedllm
from fedllm.app.budget import reached, told
from fedllm.app.build import Parts, build
from fedllm.app.compare import baselines
from fedllm.app.config import Recipe, read_recipe, read_toml, write_recipe
from fedllm.app.data import anchored
from fedllm.app.plan_view import facts_text
from fedllm.app.privacy import has_secret, keeps_losses, tokenizer_entries
from fedllm.app.progress import Ui
from fedllm.app.report.page import write_report
from fedllm.app.results import write_metrics
from fedllm.app.rows import counted
from fedllm.app.scores import check_files, general_losses, score_files
from fedllm.app.scratch import start
from fedllm.app.stages import Nodes, evaluation_steps, held_out_losses, here, one_round, said
from fedllm.app.terminal import many
from fedllm.core.errors import FedllmError, Interrupted
from fedllm.core.noise import fresh_secret
from fedllm.core.types import State, Tensors, on_meta
from fedllm.exchange.ledger import NAME as LEDGER
from fedllm.exchange.ledger import Entry, note
from fedllm.runtime.secret import secret_in
from fedllm.runtime.store import (
    append_event,
    load_checkpoint,
    locked,
    new_run,
    on_disk,
    read_events,
    require_same,
    trim_events,
    write_text,
)
from fedllm.silo.groups import who_holds_what
from fedllm.silo.spooled import at_hand
from fedllm.silo.trainables import export, trained, write


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    ui: Ui | None = None,
    secret: bytes | None = None,
) -> Path:
    """Run a recipe and return the run's folder, by default `runs/NAME`.

    Noise is drawn from a `secret` of the operating system's generator; only a test says another one.

    Raises `FedllmError` with one sentence for whatever the user can mend.
    """
    read = anchored(read_recipe(recipe, settings))
    folder = Path(out) if out else Path("runs") / read.name
    if folder.exists():
        new_run(folder)
    with ui or Ui(None) as shown, TemporaryDirectory() as apart:
        # Whatever is wrong shows here, before there is a folder.
        check_files(read)
        told, from_nothing = {}, Path(apart) / "start"
        if read.scratch:
            told = start(read, from_nothing, shown)
            read = read.model_copy(update={"model": str(from_nothing)})
        secret = secret or fresh_secret()
        parts = built(read, shown, secret)
        # What was solved for is written down: a resumed run goes on with the same noise.
        read = parts.recipe
        if read.scratch:
            read = read.model_copy(update={"model": str(folder.absolute() / "start")})
            parts = parts._replace(recipe=read)
        place(folder, read, from_nothing, secret, tokenizer_entries(read, told.pop("looks", {})))
        with locked(folder), resumable(folder), parts.ranks or nullcontext():
            if told:
                append_event(folder, {"event": "scratch", **told})
            go(folder, parts, shown)
    return folder


def resume(folder: str | Path, ui: Ui | None = None) -> Path:
    """Go on with a run from its last checkpoint; the result is that of the run that was not stopped."""
    folder = Path(folder)
    if not (folder / "recipe.toml").is_file():
        raise FedllmError(f"There is no run in '{folder}'; give the folder that `fedllm run` made.")
    with locked(folder), ui or Ui(None) as shown, resumable(folder):
        recipe = read_recipe(read_toml(folder / "recipe.toml"))
        secret = secret_in(folder) if has_secret(recipe) else None
        parts = built(recipe, shown, secret)
        with parts.ranks or nullcontext():
            go(folder, parts, shown)
    return folder


def built(recipe: Recipe, ui: Ui, secret: bytes | None = None) -> Parts:
    """Build a run's parts and say in a line what they are."""
    with ui.part("opening model and text", None):
        parts = build(recipe, secret=secret)
    silos = parts.silos
    if recipe.duplicates and len(silos.names) < 2:
        raise FedllmError("[duplicates] compares the texts of silos, and there is one; take it out of the recipe.")
    train, test = (sum(len(shard[place]) for shard in silos.shards.values()) for place in (0, 1))
    skipped = sum(silos.skipped.values())
    ui.say(
        f"{many(len(silos.names), 'silo')}, {train:,} rows to learn from and {test:,} held out"
        + (f" ({skipped:,} of them too long or empty)" if skipped else "")
    )
    for name, shard in silos.shards.items():
        if shard.cleaned:
            ui.say(f"{name} cleaned: {counted(shard.cleaned)}")
    if parts.endpoint:
        ui.say(parts.endpoint.check())
    learned = parts.method.name if parts.method else f"{parts.plan.parameters:,} parameters trained"
    ui.say(f"{learned} ({parts.trainable.name}), {computed(parts)}")
    return parts


def computed(parts: Parts) -> str:
    """Say where and how a run computes."""
    together = f", {parts.width} silos as one batch" if parts.width > 1 else ""
    together += f", {parts.recipe.processes} processes together" if parts.ranks else ""
    return f"on {parts.device.type} in {str(parts.dtype).removeprefix('torch.')}{together}"


def place(folder: Path, recipe: Recipe, from_nothing: Path, secret: bytes, spent: Sequence[Entry]) -> None:
    """Make the run's folder with recipe and start in it, all at once: a folder without them could not be resumed."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    beside = folder.with_name(f".{folder.name}.{os.getpid()}")
    beside.mkdir(exist_ok=True)
    try:
        write_text(beside / "recipe.toml", write_recipe(recipe))
        if has_secret(recipe):
            secret_in(beside, secret)
        if spent:
            note(beside / LEDGER, spent)
        if from_nothing.exists():
            shutil.copytree(from_nothing, beside / "start")
        beside.rename(folder)
    except OSError:
        if folder.exists():
            new_run(folder)
        raise
    finally:
        shutil.rmtree(beside, ignore_errors=True)


@contextmanager
def resumable(folder: Path) -> Iterator[None]:
    """Tell the user who stops a run how to go on with it."""
    try:
        yield
    except Interrupted:
        raise Interrupted(f"Stopped; `fedllm resume {folder}` goes on from the last round.") from None


def go(folder: Path, parts: Parts, ui: Ui, elsewhere: Nodes | None = None) -> None:
    """Do what is not done yet, with the nodes of this machine or with those `elsewhere`."""
    recipe, memory = parts.recipe, dict[str, Tensors]()
    if parts.endpoint:
        parts.endpoint.purse.keep(folder / "spent.json")
    nodes = elsewhere or here(parts, memory, ui)
    if kept := load_checkpoint(folder):
        # What a method finds may grow in number from round to round.
        if not parts.method:
            require_same(folder, kept.state, parts.algorithm.init(on_meta(parts.params)))
        home = next(iter(parts.params.values())).device
        state = State(kept.state.round, *({n: v.to(home) for n, v in part.items()} for part in kept.state[1:]))
        memory.update({name: {n: v.to(home) for n, v in each.items()} for name, each in kept.memory.items()})
        del kept
    else:
        state = parts.algorithm.init(parts.params)
    events = trim_events(folder, state.round)
    done = {event["event"] for event in events}
    if "start" not in done:
        append_event(folder, start_event(parts, nodes))
    ui.whole("rounds", recipe.rounds, state.round)
    reached(folder, parts, nodes.held, state.round + 1)

    if "base" not in done:
        begun = time.perf_counter()
        with ui.part("base model", evaluation_steps(parts, parts.looked)):
            losses = held_out_losses(parts, nodes.exchange, parts.shown(state), base=True)
            losses |= general_losses(parts, parts.shown(state), ui.tick, base=True)
        scores = score_files(parts, ui.tick, base=True)
        append_event(folder, {"event": "base", **losses, "scores": scores, "seconds": time.perf_counter() - begun})
        if not keeps_losses(recipe):
            ui.say(f"base model: {said(losses)}")
    stored = 0.0
    while state.round < recipe.rounds:
        if why := reached(folder, parts, nodes.held, state.round + 1):
            if "stopped" not in done:
                append_event(folder, {"event": "stopped", "round": state.round, "why": why})
            ui.say(why)
            break
        state, stored = one_round(folder, parts, state, nodes, ui, stored)
        ui.whole("rounds", recipe.rounds, state.round)
    if not parts.method:
        # The result is the parameters, and a model beside them; what rounds remember is in the checkpoint.
        state = state._replace(optimiser={}, transforms={})
    baselines(folder, parts, nodes, ui, state.round)
    finish(folder, parts, state, ui)


def finish(folder: Path, parts: Parts, state: State, ui: Ui) -> None:
    """Write the adapter (or model), the numbers and the report."""
    events = read_events(folder)
    # A resumed run may have come this far before; the result is whole if this was the last word.
    if events[-1]["event"] != "done":
        scores = put_down(folder, parts, state, ui)
        general = general_losses(parts, parts.shown(state), ui.tick)
        seconds = sum(total_seconds(event) for event in events if event["event"] != "done")
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
        if parts.endpoint:
            used = parts.endpoint.purse.used
            cost = f", cost {used.cost:,.4f}" if used.cost else ""
            ui.say(f"asked the API {used.calls:,} times: {used.read:,} tokens read, {used.written:,} written{cost}")
        event = {"event": "done", "scores": scores, **general, "seconds": seconds, "peak_mb": round(peak)}
        append_event(folder, {**event, **told(folder, parts)})
    write_metrics(folder)
    write_report(folder)


def put_down(folder: Path, parts: Parts, state: State, ui: Ui) -> dict[str, Any]:
    """Write what was learned into a folder of the run, and return its scores on the recipe's files."""
    target = folder / ("adapter" if parts.trainable.adapter else "model")
    if parts.method:
        target = folder / parts.method.folder
        with on_disk(target):
            parts.method.export(parts.model, parts.shown(state), target)
    else:
        write(trained(parts.model), {**parts.own, **state.params})
    scores = score_files(parts, ui.tick)
    if not parts.method:
        with on_disk(target):
            export(parts.model, target)
    if target.name != "prompt":
        with on_disk(target):
            parts.tokenizer.save_pretrained(target)
    return scores


def runtime(parts: Parts) -> str:
    """Say by what the clients are trained."""
    if not all(shard.train for shard in parts.silos.shards.values()):
        return "federation"
    return f"cohort of {parts.width}" if parts.width > 1 else "local"


def total_seconds(event: Mapping[str, Any]) -> float:
    """Return the seconds that an event stands for."""
    seconds = event.get("seconds", 0.0)
    return sum(seconds.values()) if isinstance(seconds, Mapping) else seconds


def start_event(parts: Parts, nodes: Nodes) -> dict[str, Any]:
    """Say what this run is: model, silos, machine, and the plan."""
    recipe, rows = parts.recipe, {name: shard.train for name, shard in parts.silos.shards.items()}
    kept = keeps_losses(recipe)
    return {
        "event": "start",
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "name": recipe.name,
        "model": recipe.model,
        "model_parameters": sum(value.numel() for value in parts.model.parameters()),
        "trained_parameters": parts.plan.parameters,
        "trainable": parts.trainable.name,
        "task": parts.task.name,
        "runtime": runtime(parts),
        "device": parts.device.type,
        "dtype": str(parts.dtype).removeprefix("torch."),
        "machine": f"{torch.get_num_threads()} threads, {platform.system()} {platform.machine()}",
        "versions": {
            "fedllm": fedllm.__version__,
            "torch": torch.__version__,
            "python": platform.python_version(),
        },
        "rounds": recipe.rounds,
        "silos": nodes.held,
        "cleaned": {name: dict(counts) for name, counts in nodes.cleaned.items() if counts},
        **({"losses": "kept"} if kept else {}),
        "holds": {} if kept or not all(map(at_hand, rows.values())) else who_holds_what(rows, parts.task.label),
        "plan": {
            "steps": [{"where": s.where, "name": s.name, "facts": facts_text(s.facts)} for s in parts.plan.steps],
            "parameters": parts.plan.parameters,
            "bytes_up": parts.plan.bytes_up,
            "bytes_down": parts.plan.bytes_down,
        },
    }
