"""The stages of a run: one federated round, and the held-out losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.app.build import Parts
from fedllm.app.progress import Ui
from fedllm.app.results import MEASURES
from fedllm.core.types import Exchange, Report, Request, Silo, State, Tensors, Work
from fedllm.runtime.link import Load, data_parallel_seconds, round_seconds
from fedllm.runtime.local import Memory, by_op, cohort, local
from fedllm.runtime.meter import Traffic, metered
from fedllm.runtime.store import Checkpoint, append_event, save_checkpoint


class Nodes(NamedTuple):
    """The silos as a run reaches them: by requests to `train` and to `evaluate`, wherever they are."""

    exchange: Exchange
    memory: Memory
    """What the nodes remember, where they are on this machine."""
    held: Mapping[str, Mapping[str, int]]
    """Examples of each silo: to `train` on and to `test` with."""
    silent: Callable[[], Mapping[str, str]] = dict
    """Why silos sent no reply since it was last asked."""


def here(parts: Parts, memory: Memory, ui: Ui) -> Nodes:
    """Return the nodes of a run on one machine."""
    train = training_exchange(parts, Work(parts.algorithm.client, parts.algorithm.cohort), memory, ui)
    held = {name: {"train": len(s.train), "test": len(s.test)} for name, s in parts.silos.shards.items()}
    return Nodes(by_op({"train": train, "score": train, "evaluate": looking(parts, memory, ui)}), memory, held)


def looking(parts: Parts, memory: Memory, ui: Ui) -> Exchange:
    """Return the exchange that evaluates on this machine; a silo may have something of its own in its `memory`."""
    return local(parts.evaluator, parts.open_silo(ui.tick), memory)


def one_round(folder: Path, parts: Parts, state: State, nodes: Nodes, ui: Ui, stored: float) -> tuple[State, float]:
    """Train, aggregate, look at the held-out text, and put it all on disk.

    `stored` is how long the last checkpoint took, which could not stand in its own event; returned
    is how long this one's did.
    """
    recipe, traffic, clock = parts.recipe, Traffic(), time.perf_counter
    asked = list(parts.select(state.round))
    known = len(asked) <= 64 and all(parts.silos.shards[name].train for name in asked)
    steps = sum(parts.work().steps(parts.silos.examples(name)) for name in asked) if known else None
    begun = clock()
    with ui.part(f"round {state.round + 1}", steps, counts=True):
        after, report = parts.algorithm.server(state, metered(nodes.exchange, traffic))
        report = {**report, **{f"dropped.{name}": why for name, why in nodes.silent().items()}}
    server = clock() - begun

    looked, losses, apart = clock(), dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    if after.round % recipe.evaluate.every == 0 or after.round == recipe.rounds:
        with ui.part("held-out loss", evaluation_steps(parts)):
            losses = held_out_losses(parts, nodes.exchange, after.params, after.round)
            if parts.first and after.round == recipe.rounds:
                apart = held_out_losses(parts, nodes.exchange, after.params, after.round, shared=True)
    event = {
        "event": "round",
        "round": after.round,
        **losses,
        **({"without_own": apart} if apart else {}),
        **tell(report),
        **(over_links(parts, traffic, report) if parts.links else {}),
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
    save_checkpoint(folder, Checkpoint(after, dict(nodes.memory)))
    ui.say(round_line(event, recipe.rounds))
    return after, clock() - begun


def over_links(parts: Parts, traffic: Traffic, report: Report) -> dict[str, float]:
    """Return how long a round takes over the recipe's network, and how long data-parallel training's steps would."""
    tokens = {name: float(report.get(f"tokens.{name}", 0.0)) for name in traffic.each}
    whole = sum(tokens.values()) or 1.0
    loads = {name: Load(up, down, traffic.seconds * tokens[name] / whole) for name, (down, up) in traffic.each.items()}
    steps = max(parts.work().steps(parts.silos.examples(name)) for name in loads)
    overlap = bool(parts.recipe.links and parts.recipe.links.overlap)
    return {
        "simulated_seconds": round_seconds(parts.links, loads, overlap),
        "data_parallel_seconds": data_parallel_seconds(parts.links, loads, parts.plan.parameters, steps, overlap),
    }


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
    parts: Parts,
    exchange: Exchange,
    params: Tensors,
    round_number: int = 0,
    names: Sequence[str] | None = None,
    base: bool = False,
    shared: bool = False,
) -> dict[str, dict[str, float]]:
    """Return `loss` (and `accuracy` and `calibrated` where the task has them) on the silos' held-out text.

    With `shared` what silos keep to themselves is left out.
    """
    names = parts.looked if names is None else names
    requests = [
        Request(name, round_number, "evaluate", params, {"base": float(base), "shared": float(shared)})
        for name in names
    ]
    found: dict[str, dict[str, float]] = {}
    for reply in exchange(requests):
        for key in MEASURES:
            if key in reply.scalars:
                found.setdefault(key, {})[reply.client] = reply.scalars[key]
    return found


def evaluation_steps(parts: Parts) -> int:
    """Return how many batches one look at the held-out text takes."""
    size = parts.recipe.evaluate.batch_size
    here = [name for name in parts.looked if parts.silos.shards[name].test]
    return sum(-(-len(parts.silos.examples(name)["test"]) // size) for name in here)


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
