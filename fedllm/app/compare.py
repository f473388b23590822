"""What federation is held against in a run: each silo alone, and everything pooled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.algorithms.baselines import alone, budget
from fedllm.app.build import Parts
from fedllm.app.progress import Ui
from fedllm.app.results import MEASURES
from fedllm.app.stages import Nodes, evaluation_steps, held_out_losses, looking, training_exchange
from fedllm.core.seeds import derive
from fedllm.core.types import Request, Silo, Tensors
from fedllm.runtime.local import local
from fedllm.runtime.store import append_event, read_events

POOLED = "everything pooled"

EVERYWHERE = 12
"""With more silos than this, a model trained alone is only tried on its own silo's text."""


def baselines(folder: Path, parts: Parts, nodes: Nodes, ui: Ui) -> None:
    """Train each silo alone, and on everything pooled, as far as the recipe asks and it is not done."""
    recipe, events = parts.recipe, read_events(folder)
    rounds = budget([parts.select(number) for number in range(recipe.rounds)])
    have = {event["silo"] for event in events if event["event"] == "alone"}
    missing = [name for name in parts.looked if name in rounds and name not in have] if recipe.evaluate.alone else []
    away = [name for name in missing if not parts.silos.shards[name].train]
    if away:
        alone_elsewhere(folder, parts, nodes, {name: rounds[name] for name in away}, ui)
    missing = [name for name in missing if name not in away]
    for place, name in enumerate(missing):
        ui.whole("silos alone", len(missing), place)
        append_event(folder, {"event": "alone", "silo": name, **alone_losses(parts, ui, name, rounds[name])})
    if recipe.evaluate.pooled and rounds and not any(event["event"] == "pooled" for event in events):
        ui.whole("everything pooled", 1)
        append_event(folder, {"event": "pooled", **pooled_losses(parts, ui, rounds)})


def alone_elsewhere(folder: Path, parts: Parts, nodes: Nodes, rounds: Mapping[str, int], ui: Ui) -> None:
    """Let silos on other machines train alone, each on its own text; only the loss comes back."""
    ui.say("each site trains alone for comparison")
    begun = time.perf_counter()
    requests = [Request(name, 0, "alone", parts.params, {"rounds": float(count)}) for name, count in rounds.items()]
    for reply in nodes.exchange(requests):
        losses = {key: {reply.client: reply.scalars[key]} for key in MEASURES if key in reply.scalars}
        seconds = time.perf_counter() - begun
        append_event(folder, {"event": "alone", "silo": reply.client, **losses, "seconds": seconds})
        begun = time.perf_counter()


def alone_losses(parts: Parts, ui: Ui, name: str, rounds: int) -> dict[str, Any]:
    """Train one silo alone for as many steps as it took in so many rounds, and look at what it learned."""
    begun, steps = time.perf_counter(), rounds * parts.work().steps(parts.silos.examples(name))
    work, memory = parts.work(steps=steps, epochs=None), dict[str, Tensors]()
    with ui.part("alone", steps, counts=True):
        exchange = training_exchange(parts, work._replace(cohort=None), memory, ui)
        ((_, params),) = alone(exchange, parts.params, [name])
    with ui.part("held-out loss", None):
        where = parts.looked if len(parts.silos.names) <= EVERYWHERE else [name]
        losses = held_out_losses(parts, looking(parts, memory, ui), params, names=where)
    ui.say(f"{name} alone: held-out loss {losses['loss'][name]:.3f} on its own text")
    return {**losses, "seconds": time.perf_counter() - begun}


def pooled_losses(parts: Parts, ui: Ui, rounds: Mapping[str, int]) -> dict[str, Any]:
    """Train on all text in one place, on as much of it as all silos read, and look at what was learned."""
    begun, silos = time.perf_counter(), parts.silos
    each = {name: count * parts.work().steps(silos.examples(name)) for name, count in rounds.items()}
    steps, changes = sum(each.values()), dict[str, Any]()
    if parts.recipe.evaluate.pooled == "data_parallel":
        rows = int(parts.recipe.client.get("batch_size", 8))
        together = round(steps / max(each.values()))
        steps, changes = max(each.values()), {"batch_size": rows * together, "micro_batch": rows}
    seed = derive(parts.recipe.seed, "silo", POOLED)
    everything = Silo(POOLED, parts.model, silos.pooled(), {}, seed, ui.tick)
    work = parts.work(steps=steps, epochs=None, **changes)
    with ui.part("pooled", steps, counts=True):
        ((_, params),) = alone(local(work.client, lambda name: everything, {}), parts.params, [POOLED])
    with ui.part("held-out loss", evaluation_steps(parts)):
        losses = held_out_losses(parts, looking(parts, {}, ui), params)
    ui.say(f"everything pooled: held-out loss {sum(losses['loss'].values()) / len(losses['loss']):.3f}")
    return {**losses, "seconds": time.perf_counter() - begun}
