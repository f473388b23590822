"""The stages of a run: one federated round, the held-out losses, and the baselines."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.algorithms.baselines import alone, budget
from fedllm.app.build import Parts
from fedllm.app.progress import Ui
from fedllm.core.seeds import derive
from fedllm.core.types import Exchange, Report, Request, Silo, State, Tensors, Work
from fedllm.runtime.local import Memory, cohort, local
from fedllm.runtime.meter import Traffic, metered
from fedllm.runtime.store import Checkpoint, append_event, read_events, save_checkpoint

POOLED = "everything pooled"

EVERYWHERE = 12
"""With more silos than this, a model trained alone is only tried on its own silo's text."""


def one_round(folder: Path, parts: Parts, state: State, memory: Memory, ui: Ui, stored: float) -> tuple[State, float]:
    """Train, aggregate, look at the held-out text, and put it all on disk.

    `stored` is how long the last checkpoint took, which could not stand in its own event; returned
    is how long this one's did.
    """
    recipe, traffic, clock = parts.recipe, Traffic(), time.perf_counter
    asked = list(parts.select(state.round))
    steps = sum(parts.work().steps(parts.silos.examples(name)) for name in asked) if len(asked) <= 64 else None
    begun = clock()
    with ui.part(f"round {state.round + 1}", steps, counts=True):
        exchange = training_exchange(parts, Work(parts.algorithm.client, parts.algorithm.cohort), memory, ui)
        after, report = parts.algorithm.server(state, metered(exchange, traffic))
    server = clock() - begun

    looked, losses = clock(), dict[str, dict[str, float]]()
    if after.round % recipe.evaluate.every == 0 or after.round == recipe.rounds:
        with ui.part("held-out loss", evaluation_steps(parts)):
            losses = held_out_losses(parts, ui, after.params)
    event = {
        "event": "round",
        "round": after.round,
        **losses,
        **tell(report),
        "asked": asked,
        "bytes_up": traffic.up,
        "bytes_down": traffic.down,
        "seconds": {
            "train": traffic.seconds,
            "aggregate": server - traffic.seconds,
            "evaluate": clock() - looked,
            "store": stored,
        },
    }
    append_event(folder, event)
    begun = clock()
    save_checkpoint(folder, Checkpoint(after, dict(memory)))
    ui.say(round_line(event, recipe.rounds))
    return after, clock() - begun


def training_exchange(parts: Parts, work: Work, memory: Memory, ui: Ui) -> Exchange:
    """Return the exchange over which this machine trains: one by one, or as a cohort."""
    opened = parts.open_silo(ui.tick)

    def open_silo(name: str) -> Silo:
        ui.at(name)
        return opened(name)

    if parts.width > 1 and work.cohort is not None:
        return cohort(work.cohort, opened, memory, parts.width)
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
    events = read_events(folder)
    took_part = budget([parts.select(number) for number in range(recipe.rounds)])
    steps = {name: rounds * parts.work().steps(silos.examples(name)) for name, rounds in took_part.items()}
    have = {event["silo"] for event in events if event["event"] == "alone"}
    missing = [name for name in silos.names if name in steps and name not in have] if recipe.evaluate.alone else []
    for place, name in enumerate(missing):
        begun = time.perf_counter()
        ui.whole("silos alone", len(missing), place)
        with ui.part("alone", steps[name], counts=True):
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
        ui.whole("everything pooled", 1)
        with ui.part("pooled", total, counts=True):
            ((_, params),) = alone(local(work.client, lambda name: everything, {}), parts.params, [POOLED])
        with ui.part("held-out loss", evaluation_steps(parts)):
            losses = held_out_losses(parts, ui, params)
        append_event(folder, {"event": "pooled", **losses, "seconds": time.perf_counter() - begun})
        ui.say(f"everything pooled: held-out loss {sum(losses['loss'].values()) / len(losses['loss']):.3f}")


def evaluation_steps(parts: Parts) -> int | None:
    """Return how many batches one look at all held-out text takes, if that is quick to say."""
    if len(parts.silos.names) > 64:
        return None
    size = parts.recipe.evaluate.batch_size
    return sum(-(-len(parts.silos.examples(name)["test"]) // size) for name in parts.silos.names)


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
