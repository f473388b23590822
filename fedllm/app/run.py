"""A run from start to end: base, rounds, the baselines, the results; resumable at every point."""

from __future__ import annotations

import json
import platform
import resource
import sys
import time
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

import fedllm
from fedllm.algorithms.baselines import alone, budget
from fedllm.app.build import Parts, build
from fedllm.app.config import Recipe, read_recipe, read_toml, write_recipe
from fedllm.app.plan_view import facts_text
from fedllm.app.progress import Ui
from fedllm.app.report import write_report
from fedllm.app.results import write_metrics
from fedllm.app.scores import score_files
from fedllm.core.seeds import derive
from fedllm.core.types import Exchange, Report, Request, Silo, State, Tensors, Work
from fedllm.runtime.local import Memory, cohort, local
from fedllm.runtime.meter import Traffic, metered
from fedllm.runtime.store import (
    Checkpoint,
    append_event,
    load_checkpoint,
    locked,
    new_run,
    save_checkpoint,
    trim_events,
    write_text,
)
from fedllm.silo.partition import who_holds_what
from fedllm.silo.trainables import export, trained, write

POOLED = "everything pooled"

EVERYWHERE = 12
"""With more silos than this, a model trained alone is only tried on its own silo's text."""


def run(
    recipe: str | Path | Mapping[str, Any] | Recipe,
    out: str | Path | None = None,
    settings: Sequence[str] = (),
    ui: Ui | None = None,
) -> Path:
    """Run a recipe and return the run's folder, by default `runs/NAME`.

    Raises `FedllmError` with one sentence for whatever the user can mend.
    """
    read = read_recipe(recipe, settings)
    folder = Path(out) if out else Path("runs") / read.name
    new_run(folder)
    with locked(folder), ui or Ui(None) as shown:
        parts = build(read)
        write_text(folder / "recipe.toml", write_recipe(read))
        append_event(folder, start_event(parts))
        go(folder, parts, shown)
    return folder


def resume(folder: str | Path, ui: Ui | None = None) -> Path:
    """Go on with a run from its last checkpoint; the result is that of the run that was not stopped."""
    folder = Path(folder)
    with locked(folder), ui or Ui(None) as shown:
        parts = build(read_recipe(read_toml(folder / "recipe.toml")))
        go(folder, parts, shown)
    return folder


def go(folder: Path, parts: Parts, ui: Ui) -> None:
    """Do what is not done yet."""
    recipe, memory = parts.recipe, dict[str, Tensors]()
    state = parts.algorithm.init(parts.params)
    if kept := load_checkpoint(folder):
        home = next(iter(parts.params.values())).device
        state = State(kept.state.round, *({n: v.to(home) for n, v in part.items()} for part in kept.state[1:]))
        memory.update(kept.memory)
    events = trim_events(folder, state.round)
    done = {event["event"] for event in events}
    if not events:
        append_event(folder, start_event(parts))
    ui.whole("rounds", recipe.rounds, state.round)

    if "base" not in done:
        begun = time.perf_counter()
        with ui.part("base model", evaluation_steps(parts)):
            losses = held_out_losses(parts, ui, parts.params, base=True)
        scores = score_files(parts, base=True)
        append_event(folder, {"event": "base", **losses, "scores": scores, "seconds": time.perf_counter() - begun})
    while state.round < recipe.rounds:
        state, event = one_round(folder, parts, state, memory, ui)
        ui.whole("rounds", recipe.rounds, state.round)
    baselines(folder, parts, ui)
    finish(folder, parts, state)


def one_round(
    folder: Path, parts: Parts, state: State, memory: Memory, ui: Ui
) -> tuple[State, Mapping[str, Any]]:
    """Train, aggregate, look at the held-out text, and put it all on disk."""
    recipe, traffic, clock = parts.recipe, Traffic(), time.perf_counter
    asked = list(parts.select(state.round))
    steps = sum(parts.work().steps(parts.silos.examples(name)) for name in asked) if len(asked) <= 64 else None
    begun = clock()
    with ui.part(f"round {state.round + 1}", steps):
        exchange = training_exchange(parts, Work(parts.algorithm.client, parts.algorithm.cohort), memory, ui)
        after, report = parts.algorithm.server(state, metered(exchange, traffic))
    server = clock() - begun

    losses, looked = {}, clock()
    if after.round % recipe.evaluate.every == 0 or after.round == recipe.rounds:
        with ui.part("held-out loss", evaluation_steps(parts)):
            losses = held_out_losses(parts, ui, after.params)
    evaluated, stored = clock() - looked, clock()
    seconds = {"train": traffic.seconds, "aggregate": server - traffic.seconds, "evaluate": evaluated}
    event = {
        "event": "round",
        "round": after.round,
        **losses,
        **tell(report),
        "asked": asked,
        "bytes_up": traffic.up,
        "bytes_down": traffic.down,
        "seconds": {**seconds, "store": 0.0},
    }
    append_event(folder, event)
    save_checkpoint(folder, Checkpoint(after, dict(memory)))
    event["seconds"]["store"] = clock() - stored
    ui.say(round_line(event, recipe.rounds))
    return after, event


def training_exchange(parts: Parts, work: Work, memory: Memory, ui: Ui) -> Exchange:
    """Return the exchange over which this machine trains: one by one, or as a cohort."""
    opened = parts.open_silo(ui.tick)

    def open_silo(name: str) -> Silo:
        ui.at(name, "training")
        return opened(name)

    if parts.width > 1 and work.cohort is not None:
        return cohort(work.cohort, open_silo, memory, parts.width)
    return local(work.client, open_silo, memory)


def held_out_losses(
    parts: Parts, ui: Ui, params: Tensors, names: Sequence[str] | None = None, base: bool = False
) -> dict[str, dict[str, float]]:
    """Return `loss` (and `accuracy` where the task has one) on the silos' held-out text."""
    exchange = local(parts.evaluator, parts.open_silo(ui.tick), {})
    names = parts.silos.names if names is None else names
    requests = [Request(name, 0, "evaluate", params, {"base": float(base)}) for name in names]
    found: dict[str, dict[str, float]] = {}
    for reply in exchange(requests):
        for key in ("loss", "accuracy"):
            if key in reply.scalars:
                found.setdefault(key, {})[reply.client] = reply.scalars[key]
    return found


def baselines(folder: Path, parts: Parts, ui: Ui) -> None:
    """Train each silo alone, and on everything pooled, as far as the recipe asks and it is not done."""
    recipe, silos = parts.recipe, parts.silos
    events = trim_events(folder, recipe.rounds)
    took_part = budget([parts.select(number) for number in range(recipe.rounds)])
    steps = {name: rounds * parts.work().steps(silos.examples(name)) for name, rounds in took_part.items()}
    have = {event["silo"] for event in events if event["event"] == "alone"}
    missing = [name for name in silos.names if name in steps and name not in have] if recipe.evaluate.alone else []
    for name in missing:
        begun = time.perf_counter()
        with ui.part(f"alone · {name}", steps[name]):
            work = parts.work(steps=steps[name], epochs=None)
            ((_, params),) = alone(training_exchange(parts, work._replace(cohort=None), {}, ui), parts.params, [name])
        where = silos.names if len(silos.names) <= EVERYWHERE else [name]
        with ui.part("held-out loss", None):
            losses = held_out_losses(parts, ui, params, where)
        append_event(folder, {"event": "alone", "silo": name, **losses, "seconds": time.perf_counter() - begun})
        own = losses["loss"][name]
        ui.say(f"{name} alone: held-out loss {own:.3f} on its own text")
    if recipe.evaluate.pooled and steps and not any(event["event"] == "pooled" for event in events):
        begun, total = time.perf_counter(), sum(steps.values())
        everything = Silo(POOLED, parts.model, silos.pooled(), {}, derive(recipe.seed, "silo", POOLED), ui.tick)
        work = parts.work(steps=total, epochs=None)
        with ui.part("pooled", total):
            ((_, params),) = alone(local(work.client, lambda name: everything, {}), parts.params, [POOLED])
        with ui.part("held-out loss", evaluation_steps(parts)):
            losses = held_out_losses(parts, ui, params)
        append_event(folder, {"event": "pooled", **losses, "seconds": time.perf_counter() - begun})


def finish(folder: Path, parts: Parts, state: State) -> None:
    """Write the adapter (or model), the numbers and the report."""
    write(trained(parts.model), state.params)
    scores = score_files(parts)
    target = folder / ("adapter" if parts.trainable.adapter else "model")
    export(parts.model, target)
    parts.tokenizer.save_pretrained(target)
    events = [event for event in trim_events(folder, state.round) if event["event"] not in ("done",)]
    seconds = sum(total_seconds(event) for event in events)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1024 if sys.platform != "darwin" else 1024**2)
    append_event(folder, {"event": "done", "scores": scores, "seconds": seconds, "peak_mb": round(peak)})
    write_metrics(folder)
    write_report(folder)


def evaluation_steps(parts: Parts) -> int | None:
    """Return how many batches one look at all held-out text takes, if that is quick to say."""
    if len(parts.silos.names) > 64:
        return None
    size = parts.recipe.evaluate.batch_size
    return sum(-(-len(parts.silos.examples(name)["test"]) // size) for name in parts.silos.names)


def total_seconds(event: Mapping[str, Any]) -> float:
    """Return the seconds that an event stands for."""
    seconds = event.get("seconds", 0.0)
    return sum(seconds.values()) if isinstance(seconds, Mapping) else seconds


def tell(report: Report) -> dict[str, Any]:
    """Return a server's report with the per-silo numbers gathered: `train_loss.a` becomes `train_loss` of `a`."""
    told: dict[str, Any] = {"dropped": {}}
    for key, value in report.items():
        kind, dot, silo = key.partition(".")
        if dot:
            told.setdefault(kind, {})[silo] = value
        else:
            told[key] = value
    told["tokens"] = int(sum(told.pop("tokens", {}).values()))
    return told


def round_line(event: Mapping[str, Any], rounds: int) -> str:
    """Say a round in one line."""
    losses = event.get("loss", {})
    loss = f", held-out loss {sum(losses.values()) / len(losses):.3f}" if losses else ""
    dropped = f", dropped {', '.join(event['dropped'])}" if event["dropped"] else ""
    speed = event["tokens"] / max(1e-9, event["seconds"]["train"])
    return (
        f"round {event['round']} of {rounds}: {event['clients']} silos, {event['tokens']:,} tokens at "
        f"{speed:,.0f}/s{loss}{dropped}"
    )


def start_event(parts: Parts) -> dict[str, Any]:
    """Say what this run is: model, silos, machine, and the plan."""
    silos, recipe = parts.silos, parts.recipe
    return {
        "event": "start",
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "name": recipe.name,
        "model": recipe.model,
        "model_parameters": sum(value.numel() for value in parts.model.parameters()),
        "trained_parameters": parts.plan.parameters,
        "trainable": parts.trainable.name,
        "task": parts.task.name,
        "runtime": f"cohort of {parts.width}" if parts.width > 1 else "local",
        "device": parts.device.type,
        "dtype": str(parts.dtype).removeprefix("torch."),
        "machine": f"{torch.get_num_threads()} threads, {platform.system()} {platform.machine()}",
        "versions": {"fedllm": fedllm.__version__, "torch": torch.__version__, "python": platform.python_version()},
        "rounds": recipe.rounds,
        "silos": {name: {"train": len(s.train), "test": len(s.test)} for name, s in silos.shards.items()},
        "holds": json.loads(
            json.dumps(who_holds_what({n: [*s.train] for n, s in silos.shards.items()}, parts.task.label))
        ),
        "plan": {
            "steps": [{"where": s.where, "name": s.name, "facts": facts_text(s.facts)} for s in parts.plan.steps],
            "parameters": parts.plan.parameters,
            "bytes_up": parts.plan.bytes_up,
            "bytes_down": parts.plan.bytes_down,
        },
    }
