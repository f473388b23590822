"""The plots of held-out loss: conditions side by side, lone models on everyone's text, round by round."""

from __future__ import annotations

from statistics import quantiles

from fedllm.app.report.data import Comparison, Losses, Run, losses, mean, summed_losses
from fedllm.app.report.figure import (
    COLOURS,
    FEW,
    SERIES,
    Figure,
    axis,
    bars,
    figure,
    folded,
    label,
    line,
    names_axis,
    outline,
    rounds_axis,
)
from fedllm.app.report.words import everyone_means, number

LOWER, HIGHER = "#e0a545", "#7ba4e8"
"""Against the federated loss: lighter than the conditions' colours, so that a number can be read on them."""
LINES = 10
"""Up to so many silos have a line each."""


def comparison(found: Comparison) -> Figure | None:
    """Plot held-out loss per silo and condition, or its distribution over many silos."""
    silos = found.silos()
    shown = {name: getattr(found, name) for name in COLOURS if getattr(found, name)}
    if not silos:
        return None
    titles = {"alone": "alone, own text"}
    if len(silos) > FEW:
        top = max(value for values in shown.values() for value in values.values())
        low = min(value for values in shown.values() for value in values.values())
        traces = [outline(titles.get(n, n), COLOURS[n], list(v.values()), low, top) for n, v in shown.items()]
        x, y = axis("held-out loss (nats per token)"), axis("silos", rangemode="tozero")
        return figure("How the silos' losses are distributed", "", traces, 300, x=x, y=y)
    traces = [
        bars(
            titles.get(name, name),
            COLOURS[name],
            orientation="h",
            y=list(range(len(silos))),
            x=[values.get(silo) for silo in silos],
            text=[number(values.get(silo)) if silo in values else "" for silo in silos],
            textposition="outside",
            cliponaxis=False,
            hovertemplate="%{x:.4f}<extra></extra>",
        )
        for name, values in shown.items()
    ]
    top = max(value for values in shown.values() for value in values.values())
    each = 17 if len(silos) <= 8 else 13
    height = len(silos) * (len(shown) * each + 14) + 56
    x = axis("held-out loss", range=[0, top * 1.16])
    y = names_axis(silos, autorange="reversed")
    return figure(
        "Held-out loss per silo",
        "In nats per token; lower is better.",
        traces,
        height,
        x=x,
        y=y,
        bargap=0.2,
        bargroupgap=0.06,
    )


def gains(found: Comparison) -> Figure | None:
    """Plot, for many silos, how much better or worse the federated model is than their own."""
    values = [found.federated[name] - own for name, own in found.alone.items() if name in found.federated]
    if len(values) <= FEW:
        return None
    reach = max(abs(value) for value in values) or 1.0
    width = reach / 15
    counts = [0] * 30
    for value in values:
        counts[min(int((value + reach) / width), 29)] += 1
    places = [-reach + width * (place + 0.5) for place in range(30)]
    sides = (
        ("federated is better", "federated", range(15)),
        ("their own model is better", "alone", range(15, 30)),
    )
    traces = [
        bars(
            name,
            COLOURS[colour],
            x=[places[i] for i in side],
            y=[counts[i] for i in side],
            width=width * 0.92,
        )
        for name, colour, side in sides
    ]
    x = axis("federated loss minus own model's loss, on own text")
    return figure("Who would gain from a personal model", "", traces, 280, x=x, y=axis("silos"), barmode="overlay")


def matrix(found: Comparison) -> Figure | None:
    """Plot the lone models on everyone's text: the colour is the distance to the federated one."""
    columns = list(found.federated) or found.silos()
    rows = [name for name in found.everywhere if any(c in found.everywhere[name] for c in columns)]
    if not rows or (len(rows) == 1 and rows == columns):
        return None
    if len(columns) > FEW or len(rows) > FEW:
        return everyone(found)
    models: list[tuple[str, Losses]] = [(folded(name), found.everywhere[name]) for name in rows]
    models += [(n, v) for n, v in (("federated", found.federated), ("pooled", found.pooled)) if v]
    models = [(f"<i>{name}</i>" if place >= len(rows) else name, v) for place, (name, v) in enumerate(models)]
    cells = [[values.get(column) for column in columns] for _, values in models]
    known = found.federated if found.federated else dict.fromkeys(columns, 0.0)
    z = [[minus(value, known.get(c)) for value, c in zip(row, columns, strict=True)] for row in cells]
    reach = max([abs(v) for row in z for v in row if v is not None] + [0.02])
    scale = [[0, LOWER], [0.5, "#f1f2f4"], [1, HIGHER]]
    trace = {
        "type": "heatmap",
        "z": z,
        "text": [[number(value) for value in row] for row in cells],
        "texttemplate": "%{text}" if len(columns) <= 9 else "",
        "textfont": {"color": "#1c2026", "size": 12 if len(columns) <= 6 else 10},
        "hovertemplate": "loss %{text}, %{z:+.3f} against federated<extra></extra>",
        "colorscale": scale,
        "zmin": -reach,
        "zmax": reach,
        "showscale": False,
        "xgap": 2,
        "ygap": 2,
    }
    x = names_axis(columns, fold=len(columns) <= 6, side="top", autotickangles=[0, -90])
    y = axis(
        tickvals=list(range(len(models))),
        ticktext=[name for name, _ in models],
        autorange="reversed",
        showgrid=False,
        zeroline=False,
    )
    made = figure("Trained by (row), tested on the text of (column)", "", [trace], 110 + 32 * len(models), x=x, y=y)
    colours = [("lower loss than federated", LOWER), ("higher loss than federated", HIGHER)]
    return made._replace(key=colours if found.federated else [])


def minus(one: float | None, other: float | None) -> float | None:
    """Subtract where both are known."""
    return None if one is None or other is None else one - other


def everyone(found: Comparison) -> Figure | None:
    """Plot how the many lone models do on everyone's text."""
    means = list(everyone_means(found).values())
    goal = mean(found.federated, list(found.federated))
    if not means or goal is None:
        return None
    trace = outline("alone", COLOURS["alone"], means, min(*means, goal), max(*means, goal))
    top = max(trace["y"])
    line = {
        "type": "scatter",
        "mode": "lines",
        "name": "federated",
        "x": [goal, goal],
        "y": [0, top],
        "line": {"width": 3, "color": COLOURS["federated"]},
        "marker": {"color": COLOURS["federated"]},
        "hovertemplate": "federated %{x:.3f}<extra></extra>",
    }
    x, y = axis("mean held-out loss over everyone's text"), axis("models", rangemode="tozero")
    return figure("Lone models on everyone's text", "", [trace, line], 280, x=x, y=y)


def history(run: Run) -> Figure | None:
    """Plot held-out loss per round: a line a silo, or the spread over many silos; of a sum the mean alone."""
    points = [(0, losses(run.base.get("loss")))] + [(e["round"], losses(e.get("loss"))) for e in run.rounds]
    points = [(number, values) for number, values in points if values]
    summed = [] if points else summed_losses(run)
    points += [(number, {"mean": value}) for number, value in summed]
    if len(points) < 2:
        return None
    numbers = [number for number, _ in points]
    silos = [] if summed else list(dict.fromkeys(name for _, values in points for name in values))
    middle = [sum(values.values()) / len(values) for _, values in points]
    if len(silos) <= LINES:
        traces = [
            line(
                label(name, 40),
                SERIES[1 + place],
                numbers,
                [values.get(name) for _, values in points],
            )
            for place, name in enumerate(silos)
        ]
    else:
        cuts = [quantiles(values.values(), n=10) if len(values) > 1 else middle[:1] * 9 for _, values in points]
        edges = [("best silo", min), ("worst silo", max)]
        traces = [line("", "#8a8f98", numbers, [cut[0] for cut in cuts])]
        band = line("the middle 80 % of silos", "#a9bfe6", numbers, [cut[-1] for cut in cuts])
        traces += [band | {"fill": "tonexty", "fillcolor": "rgba(47,111,214,0.15)"}]
        pick = zip(edges, ("#2c9a5a", "#b5617b"), strict=True)
        traces += [line(n, c, numbers, [f(v.values()) for _, v in points]) for (n, f), c in pick]
    thick = line("mean", COLOURS["federated"], numbers, middle)
    traces.append(thick | {"line": {"width": 4, "color": COLOURS["federated"]}})
    caption = "Each silo counts alike in the mean. The axis does not start at zero."
    caption += " It was told in secure sums, each in the round after; of the last round none was." * bool(summed)
    x, y = rounds_axis(numbers), axis("held-out loss (nats per token)")
    return figure("Held-out loss of the federated model after each round", caption, traces, 330, x=x, y=y)
