"""What federation is held against in a run: each silo alone, and everything pooled."""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.algorithms.baselines import alone, budget
from fedllm.algorithms.method import Method, only, rounds_of
from fedllm.app.build import Parts
from fedllm.app.progress import Ui
from fedllm.app.results import MEASURES
from fedllm.app.scores import general_losses
from fedllm.app.stages import Nodes, evaluation_steps, held_out_losses, looking, said, training_exchange
from fedllm.core.seeds import derive
from fedllm.core.types import Request, Silo, Tensors
from fedllm.runtime.local import local
from fedllm.runtime.store import append_event, read_events
from fedllm.silo.examples import Together

POOLED = "everything pooled"

EVERYWHERE = 12
"""With more silos than this, a model trained alone is only tried on its own silo's text."""


def baselines(folder: Path, parts: Parts, nodes: Nodes, ui: Ui, rounds_done: int) -> None:
    """Train each silo alone, and on everything pooled, as far as the recipe asks and it is not done."""
    recipe, events = parts.recipe, read_events(folder)
    rounds = budget([parts.present(number) for number in range(rounds_done)])
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
    begun, steps, memory = time.perf_counter(), rounds * parts.pace(name), dict[str, Tensors]()
    with ui.part("alone", steps, counts=True):
        if parts.method:
            params = by_method(parts.method, parts.open_silo(ui.tick)(name), rounds)
        else:
            work = parts.work(steps=steps, epochs=None)._replace(cohort=None)
            ((_, params),) = alone(training_exchange(parts, work, memory, ui), parts.params, [name])
    with ui.part("held-out loss", None):
        where = parts.looked if len(parts.silos.names) <= EVERYWHERE else [name]
        losses = held_out_losses(parts, looking(parts, memory, ui), params, names=where)
    ui.say(f"{name} alone: {said(losses, name)} on its own text")
    return {**losses, "seconds": time.perf_counter() - begun}


def by_method(method: Method, silo: Silo, rounds: int) -> Tensors:
    """Return what a method learns in so many rounds from one silo alone."""
    algorithm = method.algorithm(only(silo.name))
    learned = method.shown(algorithm.init(method.start))
    for state, _ in rounds_of(method, only(silo.name), local(algorithm.client, lambda name: silo, {}), rounds):
        learned = method.shown(state)
    return learned


def pooled_losses(parts: Parts, ui: Ui, rounds: Mapping[str, int]) -> dict[str, Any]:
    """Train on all text in one place, on as much of it as all silos read, and look at what was learned."""
    begun, silos = time.perf_counter(), parts.silos
    each = {name: count * parts.pace(name) for name, count in rounds.items()}
    steps, changes = sum(each.values()), dict[str, Any]()
    seed, rows = parts.recipe.seed, int(parts.recipe.client.get("batch_size", 8))
    data: dict[str, Any] = {**silos.pooled()}
    if parts.recipe.evaluate.pooled == "data_parallel":
        together = round(steps / max(each.values()))
        steps, changes = max(each.values()), {"batch_size": rows * together, "micro_batch": rows}
    elif parts.recipe.evaluate.pooled == "same_batches":
        orders = {name: derive(derive(seed, "silo", name), "order") for name in each}
        data["train"] = Together([(silos.examples(name)["train"], order) for name, order in orders.items()], rows)
        steps, changes = round(steps / len(each)), {"batch_size": rows * len(each), "micro_batch": rows}
    everything = Silo(POOLED, parts.model, data, {}, derive(seed, "silo", POOLED), ui.tick)
    with ui.part("pooled", steps, counts=True):
        if parts.method:
            params = by_method(parts.method, everything, parts.recipe.rounds)
        else:
            work = parts.work(steps=steps, epochs=None, **changes)
            ((_, params),) = alone(local(work.client, lambda name: everything, {}), parts.params, [POOLED])
    with ui.part("held-out loss", evaluation_steps(parts, parts.looked)):
        losses = held_out_losses(parts, looking(parts, {}, ui), params)
        losses |= general_losses(parts, params, ui.tick)
    ui.say(f"everything pooled: held-out loss {sum(losses['loss'].values()) / len(losses['loss']):.3f}")
    return {**losses, "seconds": time.perf_counter() - begun}
