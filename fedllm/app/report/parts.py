"""The report's tables and sentences, as text that the template only has to place."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from fedllm.app.report.cleaning import cleaned_away
from fedllm.app.report.data import Comparison, Run, is_number, losses, mean, part
from fedllm.app.report.words import duration, everyone_means, number, perplexity, plain, size

CONDITIONS = ("base", "alone", "federated", "shared", "pooled")
ALL = 40
"""Up to so many silos have a row each in a table; of more, the `ENDS` worst and best are shown."""
ENDS = 20


def cards(found: Comparison) -> list[dict[str, str]]:
    """Return the mean loss of each condition, the lone models' as a range over everyone's text."""
    made = []
    for name in CONDITIONS:
        values = getattr(found, name)
        average = mean(values, list(values))
        everyone = list(everyone_means(found).values()) if name == "alone" else []
        if everyone:
            low, high = (f"{edge:.2f}" for edge in (min(everyone), max(everyone)))
            span = low if low == high else f"{low} to {high}"
            made.append({"name": name, "title": "Alone, for everyone", "value": span})
            made[-1]["small"] = f"own text {number(average)}"
        elif average is not None:
            title = "Alone, on own text" if name == "alone" else name.capitalize()
            made.append({"name": name, "title": title, "value": f"{average:.2f}"})
            made[-1]["small"] = f"perplexity {perplexity(average)}"
    return made


def table(found: Comparison, higher: bool = False) -> dict[str, Any]:
    """Return the comparison per silo; of very many silos, the two ends. The best is marked."""
    names = [name for name in CONDITIONS if getattr(found, name)]
    silos = found.silos()
    rows = [row(found, names, silo, higher) for silo in silos]
    if len(silos) > ALL:
        what = "accuracy" if higher else "loss"
        by = found.federated or found.base or found.alone
        order = sorted((silo for silo in silos if silo in by), key=lambda silo: -by[silo])
        worst, best = order[:ENDS], order[-ENDS:]
        left_out = len(silos) - len(worst) - len(best)
        rows = [{"gap": f"The {len(worst)} silos with the highest {what}"}]
        rows += [row(found, names, silo, higher) for silo in worst]
        rows += [{"gap": f"… {left_out:,} silos between, in metrics.json …"}]
        rows += [{"gap": f"The {len(best)} silos with the lowest {what}"}]
        rows += [row(found, names, silo, higher) for silo in best]
    means = [mean(values, list(values)) for values in (getattr(found, name) for name in names)]
    return {"names": names, "rows": rows, "mean": [cell(value) for value in means]}


def row(found: Comparison, names: list[str], silo: str, higher: bool) -> dict[str, Any]:
    """Return one silo's losses, the lowest marked, or its accuracies, the `higher` the better."""
    values = [getattr(found, name).get(silo) for name in names]
    known = [value for value in values if value is not None]
    best = (max if higher else min)(known) if len(known) > 1 else None
    cells = [cell(value) | {"best": value is not None and value == best} for value in values]
    return {"gap": "", "silo": plain(silo), "cells": cells}


def cell(loss: float | None) -> dict[str, Any]:
    """Return a loss and its perplexity as text."""
    return {"loss": number(loss), "perplexity": perplexity(loss) if loss is not None else ""}


def holdings(run: Run) -> list[list[str]]:
    """Return what each silo holds, unless there are too many silos for a table."""
    held, silos = part(run.start, "holds"), part(run.start, "silos")
    rows, words = part(held, "rows"), part(held, "words")
    names = list(dict.fromkeys([*rows, *silos]))
    if len(names) > ALL:
        return []
    split = {name: part(silos, name) for name in names}
    return [
        [
            plain(name),
            number(split[name].get("train", rows.get(name)), 0),
            number(split[name].get("test"), 0),
            number(words.get(name), 0),
        ]
        for name in names
    ]


def total(run: Run, key: str) -> float | None:
    """Return a total from the metrics, or the sum over the rounds so far."""
    whole = run.metrics.get(key)
    values = [entry[key] for entry in run.rounds if is_number(entry.get(key))]
    return whole if is_number(whole) else sum(values) if values else None


def spent(run: Run) -> dict[str, float]:
    """Return the seconds that each kind of work took."""
    known: dict[str, Any] = {"Base model, evaluation": run.base.get("seconds")}
    words = {"train": "training", "evaluate": "evaluation", "aggregate": "aggregation", "store": "storing"}
    for entry in run.rounds:
        for name, value in losses(entry.get("seconds")).items():
            title = f"Rounds, {words.get(name, plain(name))}"
            known[title] = known.get(title, 0.0) + value
    lone = [event["seconds"] for event in run.alone.values() if is_number(event.get("seconds"))]
    known |= {"Each silo alone, for comparison": sum(lone) or None}
    known |= {"Pooled training, for comparison": run.pooled.get("seconds")}
    found = {name: float(value) for name, value in known.items() if is_number(value) and value > 0}
    whole = run.done.get("seconds")
    rest = whole - sum(found.values()) if is_number(whole) else 0.0
    # A resumed run's rounds may have run in another process, whose time `done` does not count.
    return found | ({"Everything else": rest} if rest > 0.05 else {})


def times(run: Run) -> list[list[str]]:
    """Return where the whole run's time went."""
    parts = spent(run)
    whole = sum(parts.values())
    if not whole:
        return []
    return [[name, duration(value), f"{100 * value / whole:.1f} %"] for name, value in parts.items()]


def cost(run: Run) -> str:
    """Say in one sentence what the run cost."""
    up, down, tokens = (total(run, key) for key in ("bytes_up", "bytes_down", "tokens"))
    seconds = run.done.get("seconds", run.metrics.get("seconds"))
    said = [f"{len(run.rounds):,} round{'s' * (len(run.rounds) != 1)}"]
    said += [f"{duration(seconds)} in all"] if is_number(seconds) else []
    said += [f"{number(tokens, 0)} tokens trained on"] if tokens else []
    said += [f"{size(up)} up and {size(down)} down, all silos together"] if up or down else []
    return "; ".join(said) + "."


def scores(run: Run) -> list[list[str]]:
    """Return the scores on tests, with the standard error of a share of right answers."""
    made = []
    for entry in [*run.scores, *measured(run)]:
        value, count, error = entry.get("federated"), entry.get("n"), ""
        if is_number(value) and is_number(count) and count > 0 and 0 <= value <= 1:
            error = f"± {math.sqrt(value * (1 - value) / count):.3f}"
        texts = [number(score, 3) for score in (entry.get("base"), value)]
        made.append([plain(entry.get("name", "")), *texts, number(count, 0), error])
    return made


def measured(run: Run) -> list[dict[str, Any]]:
    """Return the scores that stand in the events of the base model and of the end."""
    before, after = part(run.base, "scores"), part(run.done, "scores")
    made = []
    for name in dict.fromkeys([*before, *after]):
        was, now = part(before, name), part(after, name)
        entry = {"name": name, "base": was.get("accuracy"), "federated": now.get("accuracy")}
        made.append(entry | {"n": now.get("n", was.get("n"))})
    return made


def resumed(run: Run) -> str:
    """Say how often a run was taken up again."""
    again = run.starts - 1
    return f", resumed {'once' if again == 1 else f'{again} times'}" if again > 0 else ""


def found_by_search(search: Mapping[str, Any]) -> dict[str, str]:
    """Return what a search found and spent."""
    best, spent, left = (search.get(key) for key in ("best_score", "calls_spent", "calls_left"))
    tokens = search.get("tokens_spent")
    return {
        "Prompt": str(search.get("prompt", "")),
        "Best score": f"{best:.3f} (lower is better)" if is_number(best) else "",
        "Calls of the model": f"{number(spent)} spent, {number(left)} left" if is_number(spent) else "",
        "Tokens of these calls": number(tokens) if is_number(tokens) else "",
    }


def about(run: Run) -> list[tuple[str, str]]:
    """Return the facts of the model, the machine and the versions."""
    start = run.start
    whole, trained = start.get("model_parameters"), start.get("trained_parameters")
    share = ""
    if is_number(whole) and is_number(trained) and whole:
        share = f" ({100 * trained / whole:.2g} % of the model)"
    rounds = f"{len(run.rounds):,} of {number(start.get('rounds'))}" if start.get("rounds") else ""
    over, parallel = (
        sum(float(entry[key]) for entry in run.rounds if is_number(entry.get(key)))
        for key in ("simulated_seconds", "data_parallel_seconds")
    )
    known = {
        "Model": start.get("model"),
        "Parameters": number(whole) if whole else "",
        "Trained": f"{number(trained)}{share}, {start.get('trainable', '')}".rstrip(", ") if trained else "",
        "Task": start.get("task"),
        "Silos": f"{len(part(start, 'silos')):,}" if part(start, "silos") else "",
        "Rounds": rounds + resumed(run),
        "Runtime": start.get("runtime"),
        "Over the recipe's links": f"{over:,.0f} s; data-parallel training {parallel:,.0f} s" if over else "",
        **found_by_search(part(run.metrics, "search")),
        "Cleaned away": cleaned_away(part(start, "cleaned")),
        "Device": ", ".join(str(start[key]) for key in ("device", "dtype") if start.get(key)),
        "Machine": start.get("machine"),
        "Versions": ", ".join(f"{name} {value}" for name, value in part(start, "versions").items()),
    }
    return [(name, plain(value, 300)) for name, value in known.items() if value]
