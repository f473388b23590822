"""The stages of a run: one federated round, and the held-out losses."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.app.budget import after_round, before_round
from fedllm.app.build import Parts
from fedllm.app.privacy import keeps_losses, sums_losses
from fedllm.app.progress import Ui
from fedllm.app.results import MEASURES
from fedllm.app.terminal import many
from fedllm.core.errors import FedllmError
from fedllm.core.types import LATE, NOTHING, Exchange, Report, Request, Silo, State, Tensors, Work
from fedllm.exchange.looking import BEYOND, COUNT, TOTAL
from fedllm.runtime.line import Aborted
from fedllm.runtime.link import Load, data_parallel_seconds, round_seconds
from fedllm.runtime.local import Memory, by_op, cohort, local
from fedllm.runtime.meter import Traffic, metered
from fedllm.runtime.store import Checkpoint, append_event, save_checkpoint

UNUSED = "rows too long or empty for the task"


class Nodes(NamedTuple):
    """The silos as a run reaches them: by requests to `train` and to `evaluate`, wherever they are."""

    exchange: Exchange
    memory: Memory
    """What the nodes remember, where they are on this machine."""
    held: Mapping[str, Mapping[str, int]]
    """Examples of each silo: to `train` on and to `test` with."""
    cleaned: Mapping[str, Mapping[str, int]] = NOTHING
    """What cleaning counted at each silo."""
    silent: Callable[[], Mapping[str, str]] = dict
    """Why silos sent no reply since it was last asked."""


def here(parts: Parts, memory: Memory, ui: Ui) -> Nodes:
    """Return the nodes of a run on one machine."""
    train = training_exchange(parts, Work(parts.algorithm.client, parts.algorithm.cohort), memory, ui)
    asked = dict.fromkeys(parts.method.ops if parts.method else parts.algorithm.ops, train)
    both = {**asked, "evaluate": looking(parts, memory, ui)}
    shards, skipped = parts.silos.shards, parts.silos.skipped
    if keeps_losses(parts.recipe):
        return Nodes(by_op(both), memory, {name: {} for name in shards})
    held = {name: {"train": len(s.train), "test": len(s.test)} for name, s in shards.items()}
    counts = {name: with_skipped(s.cleaned, skipped.get(name, 0)) for name, s in shards.items()}
    return Nodes(by_op(both), memory, held, counts)


def with_skipped(cleaned: Mapping[str, int], skipped: int) -> dict[str, int]:
    """Return what cleaning counted, and the rows of which the task could use nothing."""
    return {**cleaned, **({UNUSED: skipped} if skipped else {})}


def looking(parts: Parts, memory: Memory, ui: Ui) -> Exchange:
    """Return the exchange that evaluates on this machine; a silo may have something of its own in its `memory`."""
    return local(parts.evaluator, parts.open_silo(ui.tick), memory if parts.first else {})


def one_round(folder: Path, parts: Parts, state: State, nodes: Nodes, ui: Ui, stored: float) -> tuple[State, float]:
    """Train, aggregate, look at the held-out text, and put it all on disk.

    `stored` is how long the last checkpoint took, which could not stand in its own event; returned
    is how long this one's did.
    """
    recipe, traffic, clock = parts.recipe, Traffic(), time.perf_counter
    asked = list(parts.select(state.round))
    known = len(asked) <= 64 and all(parts.silos.shards[name].train for name in asked)
    steps = None
    if known:
        there = parts.present(state.round)
        steps = sum(parts.pace(name) for name in there)
        if sums_losses(recipe) and state.round % recipe.evaluate.every == 0:
            steps += evaluation_steps(parts, there)
    before_round(folder, parts, nodes.held, asked, state.round + 1)
    begun = clock()
    with ui.part(f"round {state.round + 1}", steps, counts=True):
        try:
            after, report = parts.algorithm.server(state, metered(nodes.exchange, traffic))
        except FedllmError as error:
            raise with_reasons(error, nodes.silent()) from error
        report = {**report, **{f"dropped.{name}": why for name, why in nodes.silent().items()}}
    server = clock() - begun
    plain, summed = told_in_sums(report)
    privacy = after_round(folder, parts, nodes.held, after)

    looked, losses, apart = clock(), dict[str, dict[str, float]](), dict[str, dict[str, float]]()
    if after.round % recipe.evaluate.every == 0 or after.round == recipe.rounds:
        with ui.part("held-out loss", evaluation_steps(parts, parts.looked)):
            losses = held_out_losses(parts, nodes.exchange, parts.shown(after), after.round)
            if parts.first and after.round == recipe.rounds:
                apart = held_out_losses(parts, nodes.exchange, parts.shown(after), after.round, shared=True)
    event = {
        "event": "round",
        "round": after.round,
        **losses,
        **({"without_own": apart} if apart else {}),
        **tell(plain),
        **({"summed": summed} if summed else {}),
        **late(report),
        **privacy,
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
    save_checkpoint(folder, Checkpoint(after, dict(nodes.memory)), recipe.keep.checkpoints)
    ui.say(round_line(event, recipe.rounds))
    return after, clock() - begun


def with_reasons(error: FedllmError, silent: Mapping[str, str]) -> FedllmError:
    """Return what ended a round with what its silos said of themselves; an end of the engine's stays what it is."""
    if isinstance(error, Aborted) or not silent:
        return error
    said = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in silent.items())
    return FedllmError(f"{error} What the sites said: {said}.")


def over_links(parts: Parts, traffic: Traffic, report: Report) -> dict[str, float]:
    """Return how long a round takes over the recipe's network, and how long data-parallel training's steps would."""
    tokens = {name: float(report.get(f"tokens.{name}", 0.0)) for name in traffic.each}
    whole = sum(tokens.values()) or 1.0
    loads = {name: Load(up, down, traffic.seconds * tokens[name] / whole) for name, (down, up) in traffic.each.items()}
    steps = max((parts.steps(parts.silos.examples(name)) for name in loads), default=0)
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

    With `shared` what silos keep to themselves is left out. Where they keep their losses, none is asked.
    """
    if keeps_losses(parts.recipe):
        return {}
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


def said(found: Mapping[str, Mapping[str, float]], name: str | None = None) -> str:
    """Say the held-out loss, or the accuracy where there is no loss: of one silo, or the mean over all."""
    for key, form in (("loss", "held-out loss {:.3f}"), ("accuracy", "accuracy {:.1%}")):
        values = found.get(key, {})
        if name in values or (name is None and values):
            return form.format(values[name] if name is not None else sum(values.values()) / len(values))
    return "nothing held out could be measured"


def evaluation_steps(parts: Parts, names: Sequence[str]) -> int:
    """Return how many batches one look at the held-out text of these silos takes."""
    size = parts.recipe.evaluate.batch_size
    here = [name for name in names if parts.silos.shards[name].test]
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


def told_in_sums(report: Report) -> tuple[Report, dict[str, float]]:
    """Return a report without what sums tell of losses, and their mean: `loss`, of how many `silos`.

    They are the silos of all sums in which each has a loss, on the weights before the round. Of those `beyond` the loss
    is more than counts.
    """
    whole = dict.fromkeys((TOTAL, COUNT, BEYOND), 0.0)
    for key, value in report.items():
        if (kind := key.partition(".")[0]) in whole:
            whole[kind] += float(value)
    plain = {key: value for key, value in report.items() if key.partition(".")[0] not in whole}
    if not whole[COUNT]:
        return plain, {}
    return plain, {"loss": whole[TOTAL] / whole[COUNT], "silos": int(whole[COUNT]), "beyond": int(whole[BEYOND])}


def late(report: Report) -> dict[str, list[str]]:
    """Return who of the dropped was late and not lost, if anybody was."""
    why = {key.removeprefix("dropped."): told for key, told in report.items() if key.startswith("dropped.")}
    names = [name for name, told in why.items() if str(told).startswith(LATE)]
    return {"late": sorted(names)} if names else {}


def round_line(event: Mapping[str, Any], rounds: int) -> str:
    """Say a round in one line."""
    loss = f", {said(event)}" if event.get("loss") or event.get("accuracy") else ""
    if "summed" in event:
        more = " or more" if event["summed"]["beyond"] else ""
        loss = f", mean held-out loss {event['summed']['loss']:.3f}{more} before it"
    slow = event.get("late", [])
    lost = [name for name in event["dropped"] if name not in slow]
    dropped = "".join(f", {word} {', '.join(names)}" for word, names in (("dropped", lost), ("late", slow)) if names)
    speed = event["tokens"] / max(1e-9, event["seconds"]["train"])
    tokens = f", {event['tokens']:,} tokens at {speed:,.0f}/s" if event["tokens"] else ""
    spent = "".join(f", epsilon {value:.3g} of a {unit}" for unit, value in event.get("epsilon", {}).items())
    return f"round {event['round']} of {rounds}: {many(event['clients'], 'silo')}{tokens}{loss}{spent}{dropped}"
