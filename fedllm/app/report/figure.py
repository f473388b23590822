"""The style that the report's plots share; silo names reach plotly only through `label`."""

from __future__ import annotations

import html
import math
from typing import Any, NamedTuple

from fedllm.app.report.words import plain

COLOURS = {"base": "#8a8f98", "alone": "#d48a0c", "federated": "#2f6fd6", "pooled": "#2c9a5a"}
SERIES = (
    *("#4c78a8", "#c96f4a", "#4f9a94", "#9766a8", "#8a8f3a", "#c25b7b"),
    *("#7aa35a", "#7a6fd0", "#b08a3c", "#6b7a8f", "#59a5c9", "#a07060"),
)
GRID = "rgba(128,128,128,0.22)"
FEW = 16
"""Up to so many silos have a bar each; beyond it the plots show how they are distributed."""


class Figure(NamedTuple):
    """A plot, what it shows, and the key of its colours (text, colour)."""

    title: str
    caption: str
    key: list[tuple[str, str]]
    spec: dict[str, Any]


def label(name: Any, longest: int = 22) -> str:
    """Return a name for plotly, which would read `<` and `&` in a text as HTML."""
    return html.escape(plain(name, longest), quote=False)


def figure(
    title: str, caption: str, traces: list[dict[str, Any]], height: int, *, x: Any, y: Any, **layout: Any
) -> Figure:
    """Make a figure; its key comes from the traces' names and colours."""
    named = [trace for trace in traces if trace.get("name") and "color" in trace.get("marker", {})]
    key = [(html.unescape(trace["name"]), trace["marker"]["color"]) for trace in named]
    base = {
        "height": height,
        "xaxis": x,
        "yaxis": y,
        "showlegend": False,
        "dragmode": False,
        "autosize": True,
    }
    margin = {"l": 8, "r": 12, "t": 8, "b": 8, "pad": 4}
    clear = {"paper_bgcolor": "rgba(0,0,0,0)", "plot_bgcolor": "rgba(0,0,0,0)"}
    font = {"family": "system-ui, -apple-system, 'Segoe UI', Roboto, sans-serif", "size": 12}
    shape = base | clear | {"margin": margin, "font": font, "hoverlabel": {"font": font}} | layout
    return Figure(title, caption, key, {"data": traces, "layout": shape})


def folded(name: Any) -> str:
    """Return a name for an axis, a long one on two lines, so that a phone has room left for the plot.

    >>> folded("<b> St Mary's Hospital")
    "&lt;b&gt; St Mary's<br>Hospital"
    """
    text = plain(name, 28)
    if len(text) <= 14:
        return label(text)
    middle = len(text) // 2
    near = [place for place in range(middle - 5, middle + 6) if text[place] in " _-/."]
    cut = min(near, key=lambda place: abs(place - middle)) + 1 if near else middle
    return f"{label(text[:cut])}<br>{label(text[cut:])}"


def axis(title: str = "", **more: Any) -> dict[str, Any]:
    """Return an axis in the report's style."""
    grid = {"gridcolor": GRID, "zerolinecolor": "rgba(128,128,128,0.6)", "zerolinewidth": 1}
    style = {"automargin": True, "fixedrange": True, "ticks": "", "ticklabelstandoff": 3}
    return grid | style | {"title": {"text": title, "standoff": 14, "font": {"size": 12}}} | more


def names_axis(silos: list[str], fold: bool = True, **more: Any) -> dict[str, Any]:
    """Return an axis with one place per silo: by number, so that equal or number-like names stay apart."""
    texts = [folded(name) if fold else label(name, 18) for name in silos]
    places = list(range(len(silos)))
    return axis(tickvals=places, ticktext=texts, showgrid=False, zeroline=False, **more)


def rounds_axis(numbers: list[int]) -> dict[str, Any]:
    """Return an axis of rounds, where round 0 is the base model."""
    first, last = numbers[0], numbers[-1]
    least = max(1.0, (last - first) / 8)
    scale = 10 ** math.floor(math.log10(least))
    step = next(factor * scale for factor in (1, 2, 5, 10) if factor * scale >= least)
    ticks = [number for number in range(first, last + 1) if number % step == 0 or first == last]
    return axis(
        "round",
        tickvals=ticks,
        ticktext=["base" if n == 0 else str(n) for n in ticks],
        showgrid=False,
        zeroline=False,
    )


def bars(name: str, colour: str, **more: Any) -> dict[str, Any]:
    """Return a trace of bars."""
    return {"type": "bar", "name": name, "marker": {"color": colour}, **more}


def line(name: str, colour: str, x: list[int], y: list[float | None]) -> dict[str, Any]:
    """Return a trace of points joined by a line."""
    return {
        "type": "scatter",
        "mode": "lines+markers" if len(x) <= 40 else "lines",
        "name": name,
        "x": x,
        "y": y,
        "connectgaps": True,
        "line": {"width": 1.6, "color": colour},
        "marker": {"color": colour, "size": 5},
        "hovertemplate": "%{y:.4f}<extra>%{fullData.name}</extra>",
    }


def outline(name: str, colour: str, values: list[float], low: float, top: float) -> dict[str, Any]:
    """Return a histogram as an outline, so that several can lie over one another."""
    bins = 30
    width = (top - low) / bins or 1.0
    counts = [0] * bins
    for value in values:
        counts[min(int((value - low) / width), bins - 1)] += 1
    return {
        "type": "scatter",
        "mode": "lines",
        "name": name,
        "x": [low + width * (place + 0.5) for place in range(-1, bins + 1)],
        "y": [0, *counts, 0],
        "line": {"shape": "hvh", "width": 2, "color": colour},
        "marker": {"color": colour},
        "fill": "tozeroy",
        "fillcolor": colour + "22",
        "hovertemplate": "loss %{x:.3f}: %{y} silos<extra></extra>",
    }
