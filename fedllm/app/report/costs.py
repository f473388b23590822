"""The plots of what the silos hold and of what a round costs."""

from __future__ import annotations

from typing import Any

from fedllm.app.report.data import Run, is_number, losses, part
from fedllm.app.report.figure import (
    FEW,
    SERIES,
    Figure,
    axis,
    bars,
    figure,
    label,
    line,
    names_axis,
    outline,
    rounds_axis,
)
from fedllm.app.report.words import apart, unit_of

PARTS = {"train": "#5d6da3", "evaluate": "#a3b0d6", "aggregate": "#b5617b", "store": "#d9b98c"}


def holds(run: Run) -> Figure | None:
    """Plot who holds what: one stacked bar a silo, or how big the many silos are."""
    held = part(run.start, "holds")
    counts = {str(k): v for k, v in part(held, "counts").items() if isinstance(v, list)}
    rows = losses(held.get("rows")) or {name: float(sum(filter(is_number, v))) for name, v in counts.items()}
    if not rows:
        return None
    if len(rows) > FEW:
        trace = outline("", SERIES[0], list(rows.values()), min(rows.values()), max(rows.values()))
        trace["hovertemplate"] = "about %{x:.0f} examples: %{y} silos<extra></extra>"
        x, y = axis("examples held"), axis("silos", rangemode="tozero")
        return figure("How much the silos hold", "", [trace], 280, x=x, y=y)
    silos = list(rows)
    groups = [str(group) for group in held.get("groups") or []]
    if not groups or not counts:
        groups, counts = ["examples"], {name: [rows[name]] for name in silos}
    traces = [
        bars(
            label(name, 40),
            SERIES[place % len(SERIES)] if name != "all other" else "#a9adb5",
            orientation="h",
            y=list(range(len(silos))),
            x=[amounts[silo][place] for silo in silos],
            hovertemplate="%{x}<extra>%{fullData.name}</extra>",
        )
        for place, name, amounts in stacked(groups, counts, silos)
    ]
    traces = traces if len(traces) > 1 else [traces[0] | {"name": ""}]
    y = names_axis(silos, autorange="reversed")
    height = 56 + 30 * len(silos)
    return figure("Examples per silo", "", traces, height, x=axis("examples"), y=y, barmode="stack", bargap=0.3)


def stacked(
    groups: list[str], counts: dict[str, list[Any]], silos: list[str]
) -> list[tuple[int, str, dict[str, list[float]]]]:
    """Return the groups to stack, the largest first; those that have no colour left are added up as one."""
    table = {silo: [float(v) if is_number(v) else 0.0 for v in counts.get(silo, [])][: len(groups)] for silo in silos}
    table = {silo: row + [0.0] * (len(groups) - len(row)) for silo, row in table.items()}
    order = sorted(range(len(groups)), key=lambda i: -sum(row[i] for row in table.values()))
    keep, rest = order[: len(SERIES)], order[len(SERIES) :]
    merged = {silo: [row[i] for i in keep] + [sum(row[i] for i in rest)] for silo, row in table.items()}
    names = [groups[i] for i in keep] + (["all other"] if rest else [])
    return [(place, name, merged) for place, name in enumerate(names)]


def seconds(run: Run) -> Figure | None:
    """Plot where each round's time went."""
    rounds = [entry for entry in run.rounds if losses(entry.get("seconds"))]
    if not rounds:
        return None
    named = {name for entry in rounds for name, value in losses(entry["seconds"]).items() if value > 0}
    known = [*(name for name in PARTS if name in named), *sorted(named - set(PARTS))]
    colours = PARTS | {name: SERIES[-1 - i] for i, name in enumerate(n for n in known if n not in PARTS)}
    numbers = [entry["round"] for entry in rounds]
    traces = [
        bars(
            label(name),
            colours[name],
            x=numbers,
            y=[losses(entry["seconds"]).get(name, 0.0) for entry in rounds],
            hovertemplate="%{y:.2f} s<extra>%{fullData.name}</extra>",
        )
        for name in known
    ]
    x = rounds_axis(numbers)
    return figure("Seconds per round", "", traces, 270, x=x, y=axis("seconds"), barmode="stack", bargap=0.35)


def traffic(run: Run) -> Figure | None:
    """Plot the bytes of each round, in both directions."""
    rounds = [e for e in run.rounds if is_number(e.get("bytes_up")) or is_number(e.get("bytes_down"))]
    if not rounds:
        return None
    numbers = [entry["round"] for entry in rounds]
    columns = {name: [float(e.get(name) or 0) for e in rounds] for name in ("bytes_up", "bytes_down")}
    unit, word = unit_of(max(max(values) for values in columns.values()))
    looks = (
        ("bytes_up", "up, silos to server", "#4f9a94"),
        ("bytes_down", "down, server to silos", "#9766a8"),
    )
    traces = [
        bars(
            name,
            colour,
            x=numbers,
            y=[value / unit for value in columns[key]],
            hovertemplate=f"%{{y:.3g}} {word}<extra></extra>",
        )
        for key, name, colour in looks
    ]
    x = rounds_axis(numbers)
    title = f"{word} per round, all silos together"
    return figure(title, "", traces, 270, x=x, y=axis(word), bargap=0.35, bargroupgap=0.12)


def error(run: Run, key: str) -> Figure | None:
    """Plot a relative error that each round tells."""
    rounds = [entry for entry in run.rounds if is_number(entry.get(key))]
    if not rounds:
        return None
    numbers, values = [e["round"] for e in rounds], [float(e[key]) for e in rounds]
    trace = line("", "#b5617b", numbers, [100 * value for value in values])
    if len(numbers) <= 12:
        texts = [f"{text} %" for text in apart(*(100 * value for value in values))]
        trace |= {
            "mode": "lines+markers+text",
            "text": texts,
            "textposition": "top center",
            "cliponaxis": False,
        }
    top = max(100 * value for value in values) or 1.0
    x, y = rounds_axis(numbers), axis("relative error (%)", range=[0, top * 1.25])
    return figure("Relative error in each round", "", [trace], 240, x=x, y=y)
