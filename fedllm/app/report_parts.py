"""The report's tables and sentences, as text that the template only has to place."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

from fedllm.app.report_data import Comparison, Run, is_number, losses, mean, part
from fedllm.app.report_words import NONE, duration, everyone_means, number, perplexity, plain, protected, size

CONDITIONS = ("base", "alone", "federated", "pooled")
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
            made.append({"name": name, "title": "Alone, everyone's text", "value": span})
            made[-1]["small"] = f"own text {number(average)}"
        elif average is not None:
            title = "Alone, on own text" if name == "alone" else name.capitalize()
            made.append({"name": name, "title": title, "value": f"{average:.2f}"})
            made[-1]["small"] = f"perplexity {perplexity(average)}"
    return made


def table(found: Comparison) -> dict[str, Any]:
    """Return the comparison per silo; of very many silos, the highest and lowest losses."""
    names = [name for name in CONDITIONS if getattr(found, name)]
    silos = found.silos()
    rows = [row(found, names, silo) for silo in silos]
    if len(silos) > ALL:
        by = found.federated or found.base or found.alone
        order = sorted((silo for silo in silos if silo in by), key=lambda silo: -by[silo])
        worst, best = order[:ENDS], order[-ENDS:]
        left_out = len(silos) - len(worst) - len(best)
        rows = [{"gap": f"The {len(worst)} silos with the highest loss"}]
        rows += [row(found, names, silo) for silo in worst]
        rows += [{"gap": f"… {left_out:,} silos between, in metrics.json …"}]
        rows += [{"gap": f"The {len(best)} silos with the lowest loss"}]
        rows += [row(found, names, silo) for silo in best]
    means = [mean(values, list(values)) for values in (getattr(found, name) for name in names)]
    return {"names": names, "rows": rows, "mean": [cell(value) for value in means]}


def row(found: Comparison, names: list[str], silo: str) -> dict[str, Any]:
    """Return one silo's losses, the lowest marked."""
    values = [getattr(found, name).get(silo) for name in names]
    known = [value for value in values if value is not None]
    cells = [cell(value) | {"best": len(known) > 1 and value == min(known)} for value in values]
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
            number(rows.get(name), 0),
            number(split[name].get("train"), 0),
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
    found = {name: float(value) for name, value in known.items() if is_number(value)}
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


def refusals(run: Run) -> str:
    """Say how many updates were dropped, and why."""
    reasons = Counter(reason for _, _, reason in dropped(run))
    listed = [
        f"{reason} ({count:,} times)" if count > 1 else reason for reason, count in reasons.most_common(5)
    ]
    more = f", and {len(reasons) - 5:,} other reasons" if len(reasons) > 5 else ""
    count = sum(reasons.values())
    plural = "s" * (count != 1)
    return f"{count:,} update{plural} did not count, and the rounds went on without: {'; '.join(listed)}{more}."


def dropped(run: Run) -> list[tuple[int, str, str]]:
    """Return each dropped update: round, silo and reason."""
    return [
        (entry["round"], plain(silo), plain(reason, 200))
        for entry in run.rounds
        for silo, reason in part(entry, "dropped").items()
    ]


def steps(run: Run) -> list[dict[str, Any]]:
    """Return the steps of one round, as planned."""
    found = part(run.start, "plan").get("steps")
    known = [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []
    return [{"where": "", "name": ""} | step for step in known]


def wire(run: Run) -> str:
    """Say how much crosses the wire per silo and round, and whether there was a wire at all."""
    plan = part(run.start, "plan")
    said = []
    if is_number(plan.get("bytes_up")):
        said.append(
            f"Per silo and round: {size(plan.get('bytes_down'))} down and {size(plan['bytes_up'])} up, "
            f"for {number(plan.get('parameters'))} trained parameters."
        )
    if run.start.get("runtime") in ("local", "cohort"):
        said.append(
            "All silos of this run were simulated in one process, so nothing crossed a network: "
            "the bytes are those that a federation would send."
        )
    return " ".join(said)


def claim(run: Run) -> str:
    """Say what privacy this run can claim."""
    if protected(steps(run)):
        return (
            "What the steps above state about updates is all that is claimed. Where they name no secure "
            "aggregation, the server sees each silo's update; where they name no noise, there is no "
            "differential privacy."
        )
    return (
        "This run used neither secure aggregation nor differential privacy. The silos' text stays where it "
        "is, but the server sees each silo's update, and updates can reveal something of the text they were "
        "computed from. No privacy guarantee is claimed."
    )


def scores(run: Run) -> list[list[str]]:
    """Return the scores on tests, with the standard error of a share of right answers."""
    made = []
    for entry in run.scores:
        value, count, error = entry.get("federated"), entry.get("n"), NONE
        if is_number(value) and is_number(count) and count > 0 and 0 <= value <= 1:
            error = f"± {math.sqrt(value * (1 - value) / count):.3f}"
        texts = [number(score, 3) for score in (entry.get("base"), value)]
        made.append([plain(entry.get("name", "")), *texts, number(count, 0), error])
    return made


def about(run: Run) -> list[tuple[str, str]]:
    """Return the facts of the model, the machine and the versions."""
    start = run.start
    whole, trained = start.get("model_parameters"), start.get("trained_parameters")
    share = ""
    if is_number(whole) and is_number(trained) and whole:
        share = f" ({100 * trained / whole:.2g} % of the model)"
    rounds = f"{len(run.rounds):,} of {number(start.get('rounds'))}" if start.get("rounds") else ""
    known = {
        "Model": start.get("model"),
        "Parameters": number(whole) if whole else "",
        "Trained": f"{number(trained)}{share}, {start.get('trainable', '')}".rstrip(", ") if trained else "",
        "Task": start.get("task"),
        "Silos": f"{len(part(start, 'silos')):,}" if part(start, "silos") else "",
        "Rounds": rounds + (f", resumed {run.starts - 1} times" if run.starts > 1 else ""),
        "Runtime": start.get("runtime"),
        "Device": ", ".join(str(start[key]) for key in ("device", "dtype") if start.get(key)),
        "Machine": start.get("machine"),
        "Versions": ", ".join(f"{name} {value}" for name, value in part(start, "versions").items()),
    }
    return [(name, plain(value, 300)) for name, value in known.items() if value]
