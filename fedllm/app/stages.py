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
    names = parts.looked if names is None else names
    requests = [Request(name, 0, "evaluate", params, {"base": float(base)}) for name in names]
    found: dict[str, dict[str, float]] = {}
    for reply in exchange(requests):
        for key in ("loss", "accuracy"):
            if key in reply.scalars:
                found.setdefault(key, {})[reply.client] = reply.scalars[key]
    return found


def baselines(folder: Path, parts: Parts, ui: Ui) -> None:
    """Train each silo alone, and on everything pooled, as far as the recipe asks and it is not done."""
    recipe, events = parts.recipe, read_events(folder)
    rounds = budget([parts.select(number) for number in range(recipe.rounds)])
    have = {event["silo"] for event in events if event["event"] == "alone"}
    missing = [name for name in parts.looked if name in rounds and name not in have] if recipe.evaluate.alone else []
    for place, name in enumerate(missing):
        ui.whole("silos alone", len(missing), place)
        append_event(folder, {"event": "alone", "silo": name, **alone_losses(parts, ui, name, rounds[name])})
    if recipe.evaluate.pooled and rounds and not any(event["event"] == "pooled" for event in events):
        ui.whole("everything pooled", 1)
        append_event(folder, {"event": "pooled", **pooled_losses(parts, ui, rounds)})


def alone_losses(parts: Parts, ui: Ui, name: str, rounds: int) -> dict[str, Any]:
    """Train one silo alone for as many steps as it took in so many rounds, and look at what it learned."""
    begun, steps = time.perf_counter(), rounds * parts.work().steps(parts.silos.examples(name))
    work = parts.work(steps=steps, epochs=None)
    with ui.part("alone", steps, counts=True):
        ((_, params),) = alone(training_exchange(parts, work._replace(cohort=None), {}, ui), parts.params, [name])
    with ui.part("held-out loss", None):
        where = parts.looked if len(parts.silos.names) <= EVERYWHERE else [name]
        losses = held_out_losses(parts, ui, params, where)
    ui.say(f"{name} alone: held-out loss {losses['loss'][name]:.3f} on its own text")
    return {**losses, "seconds": time.perf_counter() - begun}


def pooled_losses(parts: Parts, ui: Ui, rounds: Mapping[str, int]) -> dict[str, Any]:
    """Train on all text in one place for as many steps as all silos took, and look at what was learned."""
    begun, silos = time.perf_counter(), parts.silos
    steps = sum(count * parts.work().steps(silos.examples(name)) for name, count in rounds.items())
    seed = derive(parts.recipe.seed, "silo", POOLED)
    everything = Silo(POOLED, parts.model, silos.pooled(), {}, seed, ui.tick)
    work = parts.work(steps=steps, epochs=None)
    with ui.part("pooled", steps, counts=True):
        ((_, params),) = alone(local(work.client, lambda name: everything, {}), parts.params, [POOLED])
    with ui.part("held-out loss", evaluation_steps(parts)):
        losses = held_out_losses(parts, ui, params)
    ui.say(f"everything pooled: held-out loss {sum(losses['loss'].values()) / len(losses['loss']):.3f}")
    return {**losses, "seconds": time.perf_counter() - begun}


def evaluation_steps(parts: Parts) -> int:
    """Return how many batches one look at the held-out text takes."""
    size = parts.recipe.evaluate.batch_size
    return sum(-(-len(parts.silos.examples(name)["test"]) // size) for name in parts.looked)


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
