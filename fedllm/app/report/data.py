"""What a run folder says, read so that a torn line, a missing file or a NaN never stops the report."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from fedllm.core.errors import FedllmError

Losses = dict[str, float]
"""Held-out loss in nats per token, by silo."""


class Run(NamedTuple):
    """The events of one run, the latest of each kind."""

    recipe: str
    start: dict[str, Any]
    base: dict[str, Any]
    rounds: list[dict[str, Any]]
    alone: dict[str, dict[str, Any]]
    pooled: dict[str, Any]
    scores: list[dict[str, Any]]
    done: dict[str, Any]
    metrics: dict[str, Any]
    starts: int
    certificate: dict[str, Any] = {}  # noqa: RUF012
    """Of what was forgotten, where the run was made for that."""


class Comparison(NamedTuple):
    """Held-out loss per silo under the four conditions, and of each lone model on everyone's text."""

    base: Losses
    alone: Losses
    federated: Losses
    pooled: Losses
    everywhere: dict[str, Losses]
    shared: Losses = {}  # noqa: RUF012
    """The federated model without what silos keep to themselves, where they keep anything."""

    def silos(self) -> list[str]:
        """Return every silo that has a loss, in the order in which they first appear."""
        return list(dict.fromkeys([*self.federated, *self.base, *self.alone, *self.pooled]))


def read_run(folder: Path) -> Run:
    """Read a run folder; of a round that was run twice because the run was resumed, the last counts."""
    events = read_events(folder / "events.jsonl")
    single: dict[str, dict[str, Any]] = {}
    rounds: dict[int, dict[str, Any]] = {}
    alone: dict[str, dict[str, Any]] = {}
    scores: dict[str, dict[str, Any]] = {}
    starts = 0
    for event in events:
        kind = event.get("event")
        if kind == "round" and isinstance(event.get("round"), int):
            rounds[event["round"]] = event
        elif kind == "alone":
            alone[str(event.get("silo"))] = event
        elif kind == "scores":
            scores[str(event.get("name"))] = event
        else:
            single[str(kind)] = event
        if kind == "start":
            starts += 1
            single.pop("done", None)
    return Run(
        recipe=read_text(folder / "recipe.toml"),
        start=single.get("start", {}),
        base=single.get("base", {}),
        rounds=[rounds[number] for number in sorted(rounds)],
        alone=alone,
        pooled=single.get("pooled", {}),
        scores=list(scores.values()),
        done=single.get("done", {}),
        metrics=read_metrics(folder / "metrics.json"),
        starts=starts,
        certificate=read_metrics(folder / "certificate.json"),
    )


def compare(run: Run, what: str = "loss") -> Comparison:
    """Gather the losses (or `accuracy`) from `metrics.json`, and from the events where it lacks them."""
    final = part(run.metrics, what)
    latest = [losses(entry.get(what)) for entry in run.rounds if losses(entry.get(what))]
    everywhere = {name: losses(event.get(what)) for name, event in run.alone.items()}
    own = {name: row[name] for name, row in everywhere.items() if name in row}
    rows = part(run.metrics, "alone_everywhere") if what == "loss" else {}
    table = {name: losses(row) for name, row in rows.items()}
    return Comparison(
        base=losses(final.get("base")) or losses(run.base.get(what)),
        alone=losses(final.get("alone")) or own,
        federated=losses(final.get("federated")) or (latest[-1] if latest else {}),
        pooled=losses(final.get("pooled")) or losses(run.pooled.get(what)),
        everywhere=table or everywhere,
        shared=losses(final.get("shared part only")),
    )


def summed_losses(run: Run) -> list[tuple[int, float]]:
    """Return after how many rounds which mean held-out loss was told in a secure sum, and no silo's own."""
    told = [(entry["round"] - 1, losses(entry.get("summed")).get("loss")) for entry in run.rounds]
    return [(after, loss) for after, loss in told if loss is not None]


def mean(values: Losses, silos: list[str]) -> float | None:
    """Return the plain mean over `silos`, each counting alike, or None where one of them has no value."""
    if not silos or any(name not in values for name in silos):
        return None
    return sum(values[name] for name in silos) / len(silos)


def part(value: dict[str, Any], key: str) -> dict[str, Any]:
    """Return a table inside a table, empty where there is none."""
    inner = value.get(key)
    return inner if isinstance(inner, dict) else {}


def losses(value: Any) -> Losses:
    """Keep the entries of a table that are finite numbers."""
    items = value.items() if isinstance(value, dict) else ()
    return {str(name): float(number) for name, number in items if is_number(number)}


def is_number(value: Any) -> TypeGuard[float]:
    """Return whether a value read from JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def read_events(path: Path) -> list[dict[str, Any]]:
    """Read the event lines; a line torn by a kill is left out."""
    text = read_text(path)
    if not text.strip():
        raise FedllmError(f"{path} is missing or empty; give the folder of a run that `fedllm run` has started.")
    events = []
    for line in text.splitlines():
        try:
            event = json.loads(line)
        except ValueError:
            continue
        if isinstance(event, dict):
            events.append(event)
    return events


def read_metrics(path: Path) -> dict[str, Any]:
    """Read `metrics.json`; a run in progress has none."""
    try:
        value = json.loads(read_text(path) or "{}")
    except ValueError:
        return {}
    return value if isinstance(value, dict) else {}


def read_text(path: Path) -> str:
    """Return a file's text, empty where there is no such file."""
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, NotADirectoryError):
        return ""
