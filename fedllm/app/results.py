"""The numbers of a run: `metrics.json` for programs, a table for the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Group
from rich.markup import escape
from rich.table import Table

from fedllm.app.terminal import many
from fedllm.runtime.store import read_events, write_text

TITLES = {
    "loss": "Held-out loss per silo (nats a token; lower is better)",
    "accuracy": "Accuracy per silo (share of held-out rows whose own word is likeliest; higher is better)",
    "calibrated": "Accuracy per silo, less what the model leans to anyway (contextual calibration)",
}
"""What a look at held-out text may tell, and how its table is headed."""

MEASURES = tuple(TITLES)

SEARCH = ("score", "best_score", "prompt", "calls_spent", "calls_left", "tokens_spent", "tokens_left")
"""What the last round of a search tells of it."""


def write_metrics(folder: Path) -> dict[str, Any]:
    """Sum a run's events up in `metrics.json`."""
    metrics = summary(read_events(folder))
    write_text(folder / "metrics.json", json.dumps(metrics, indent=1) + "\n")
    return metrics


def read_metrics(folder: Path) -> dict[str, Any]:
    """Return a run's numbers, as far as it has come."""
    path = folder / "metrics.json"
    return json.loads(path.read_text()) if path.exists() else summary(read_events(folder))


def summary(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the numbers of a run from its events."""
    rounds = [event for event in events if event["event"] == "round"]
    looked = [event for event in rounds if event.get("loss") or event.get("accuracy")]
    alone = {event["silo"]: event["loss"] for event in events if event["event"] == "alone" and "loss" in event}
    metrics: dict[str, Any] = {"loss": {}, "rounds": len(rounds)}
    if last(events, "start").get("losses") == "kept":
        metrics["losses_kept"] = True
    if summed := [{"after": event["round"] - 1, **event["summed"]} for event in rounds if "summed" in event]:
        metrics["summed_loss"] = summed
    for key in MEASURES:
        found = {
            "base": last(events, "base").get(key, {}),
            "alone": {
                event["silo"]: event[key][event["silo"]]
                for event in events
                if event["event"] == "alone" and event["silo"] in event.get(key, {})
            },
            "federated": looked[-1].get(key, {}) if looked else {},
            "shared part only": looked[-1].get("without_own", {}).get(key, {}) if looked else {},
            "pooled": last(events, "pooled").get(key, {}),
        }
        if any(found.values()):
            metrics[key] = {kind: values for kind, values in found.items() if values}
    if alone:
        metrics["alone_everywhere"] = alone
    kinds = {"base": "base", "federated": "done", "pooled": "pooled"}
    general = {kind: last(events, event).get("general") for kind, event in kinds.items()}
    if any(general.values()):
        metrics["general"] = {kind: values for kind, values in general.items() if values}
    for key in ("tokens", "bytes_up", "bytes_down"):
        metrics[key] = sum(event[key] for event in rounds)
    metrics["dropped"] = sum(len(event["dropped"]) for event in rounds)
    if slow := sum(len(event.get("late", [])) for event in rounds):
        metrics["late"] = slow
    metrics["seconds"] = last(events, "done").get("seconds", 0.0)
    metrics["train_seconds"] = sum(event["seconds"]["train"] for event in rounds)
    if "peak_mb" in last(events, "done"):
        metrics["peak_mb"] = last(events, "done")["peak_mb"]
    for key in ("aggregation_error", "truncation_error"):
        if rounds and key in rounds[-1]:
            metrics[key] = rounds[-1][key]
    if found := {key: rounds[-1][key] for key in SEARCH if rounds and key in rounds[-1]}:
        metrics["search"] = found
    for key in ("simulated_seconds", "data_parallel_seconds"):
        if any(key in event for event in rounds):
            metrics[key] = sum(event.get(key, 0.0) for event in rounds)
    if said := last(events, "done").get("privacy"):
        metrics["privacy"] = said
    elif rounds and "epsilon" in rounds[-1]:
        metrics["epsilon"] = rounds[-1]["epsilon"]
    if why := last(events, "stopped").get("why"):
        metrics["stopped"] = why
    if told := last(events, "scratch"):
        metrics["scratch"] = {key: value for key, value in told.items() if key != "event"}
    scores = {"base": last(events, "base").get("scores"), "federated": last(events, "done").get("scores")}
    if scores["base"]:
        metrics["scores"] = scores
    return metrics


def last(events: Sequence[Mapping[str, Any]], kind: str) -> Mapping[str, Any]:
    """Return the last event of a kind, or an empty one."""
    return next((event for event in reversed(events) if event["event"] == kind), {})


def comparisons(metrics: Mapping[str, Any], most: int = 20) -> Group:
    """Return the tables of held-out losses per silo, and of accuracies where the task has them."""
    if not metrics["loss"] and metrics.get("accuracy"):
        return Group(accuracies(metrics["accuracy"], most))
    return Group(*(comparison(metrics, most, what) for what in TITLES if metrics.get(what)))


def comparison(metrics: Mapping[str, Any], most: int = 20, what: str = "loss") -> Table:
    """Return the table of one measure per silo; with many silos the first `most` of them and the mean."""
    found, higher = metrics[what], what != "loss"
    kinds = [kind for kind in ("base", "alone", "federated", "shared part only", "pooled") if kind in found]
    table = Table(title=TITLES[what], title_justify="left")
    table.add_column("silo")
    for kind in kinds:
        table.add_column({"alone": "alone, own text"}.get(kind, kind), justify="right")
    names = list(found.get("base", found.get("federated", {})))
    for name in names[:most]:
        values = {kind: found[kind].get(name) for kind in kinds}
        best = (max if higher else min)(value for value in values.values() if value is not None)
        table.add_row(escape(name), *(shown(value, value == best) for value in values.values()))
    if len(names) > most:
        table.add_row(f"… {len(names) - most} more", *[""] * len(kinds))
    table.add_section()
    means = [mean(found[kind]) for kind in kinds]
    table.add_row("mean", *(f"{value:.3f}" for value in means))
    everywhere = metrics.get("alone_everywhere", {}) if what == "loss" else {}
    if len(everywhere) > 1 and all(len(values) == len(names) for values in everywhere.values()):
        span = sorted(mean(values) for values in everywhere.values())
        cells = {
            "alone": f"{span[0]:.3f} to {span[-1]:.3f}",
            "federated": f"{mean(found.get('federated', {})):.3f}",
        }
        table.add_row("one model for everyone", *(cells.get(kind, f"{mean(found[kind]):.3f}") for kind in kinds))
    general = metrics.get("general", {}) if what == "loss" else {}
    if general:
        table.add_section()
    for name in general.get("base", {}):
        values = {kind: general.get(kind, {}).get(name) for kind in kinds}
        table.add_row(f"{escape(name)}, general text", *(shown(value, False) for value in values.values()))
    return table


def gain_kept(losses: Mapping[str, Mapping[str, float]]) -> dict[str, float]:
    """Return of each silo what share of the perplexity that pooled training takes off the base federated training does.

    (exp(base) - exp(federated)) / (exp(base) - exp(pooled)), for the silos where pooled training gains at all.
    """
    base, federated, pooled = ({**losses.get(kind, {})} for kind in ("base", "federated", "pooled"))
    both = [name for name in federated if name in pooled and pooled[name] < base.get(name, -math.inf)]
    return {
        name: (math.exp(base[name]) - math.exp(federated[name])) / (math.exp(base[name]) - math.exp(pooled[name]))
        for name in both
    }


def accuracies(found: Mapping[str, Mapping[str, float]], most: int) -> Table:
    """Return the table of right answers per silo, for a run that has no loss."""
    table = Table(title="Right answers per silo on held-out questions", title_justify="left")
    for column in ("silo", *found):
        table.add_column(column, justify="left" if column == "silo" else "right")
    names = list(found.get("base", found.get("federated", {})))
    for name in names[:most]:
        table.add_row(escape(name), *(f"{kind[name]:.1%}" if name in kind else "-" for kind in found.values()))
    table.add_section()
    table.add_row("mean", *(f"{mean(kind):.1%}" for kind in found.values()))
    return table


def verdict(metrics: Mapping[str, Any]) -> str:
    """Say what federation bought, and who would still gain from a personal model."""
    losses = metrics["loss"]
    federated, own = losses.get("federated", {}), losses.get("alone", {})
    right = metrics.get("accuracy", {})
    if not federated and right.get("federated"):
        shares = ", ".join(f"{kind} {mean(values):.1%}" for kind, values in right.items())
        return f"Right answers, mean over silos: {shares}."
    if metrics.get("losses_kept"):
        silent = "No silo told its held-out loss (secure.losses is false)"
        if summed := metrics.get("summed_loss"):
            told = [f"{each['loss']:.3f} after {many(each['after'], 'round')}" for each in (summed[0], summed[-1])]
            return f"{silent}; the mean of all, told in sums, was {' and '.join(told)}."
        return f"{silent}; of the model's quality only the server's files tell (evaluate.general, choice and exact)."
    if not federated:
        return "No federated model has been evaluated yet."
    sentences = [f"The federated model's mean held-out loss is {mean(federated):.3f}"]
    if "base" in losses:
        sentences[0] += f" (base {mean(losses['base']):.3f})"
    everywhere = metrics.get("alone_everywhere", {})
    if everywhere and all(len(values) == len(federated) for values in everywhere.values()):
        best = min(mean(values) for values in everywhere.values())
        word = "better" if mean(federated) < best else "worse"
        sentences.append(f"on everyone's text it is {word} than the best model that one silo made alone ({best:.3f})")
    personal = [name for name, value in own.items() if value < federated.get(name, value)]
    if own:
        sentences.append(
            f"on their own text {', '.join(personal)} would still gain from a personal model"
            if personal
            else "no silo does better alone, even on its own text"
        )
    if kept := gain_kept(losses).values():
        ends = dict.fromkeys(f"{edge:.0%}" for edge in (min(kept), max(kept)))
        sentences.append(f"of the perplexity that pooled training gains it keeps {' to '.join(ends)}, silo by silo")
    general = metrics.get("general", {})
    for name, after in general.get("federated", {}).items():
        was, now = (f"{math.exp(min(loss, 700)):.2f}" for loss in (general["base"][name], after))
        sentences.append(f"on general text ({name}) the perplexity was {was} and is {now}")
    if "simulated_seconds" in metrics:
        here, parallel = metrics["simulated_seconds"], metrics["data_parallel_seconds"]
        sentences.append(f"over the recipe's links it takes {here:,.0f} s, data-parallel training {parallel:,.0f} s")
    return "; ".join(sentences) + "."


def mean(values: Mapping[str, float]) -> float:
    """Return the mean over silos."""
    return sum(values.values()) / len(values) if values else float("nan")


def shown(value: float | None, best: bool) -> str:
    """Return a loss as text, the best of its row in bold."""
    if value is None:
        return "-"
    return f"[bold green]{value:.3f}[/]" if best else f"{value:.3f}"
