"""The held-out loss over tokens of every run of the pre-training benchmark, as an SVG: docs/pretrain.svg."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from math import floor
from typing import Any

WIDTH, HEIGHT = 760, 440
LEFT, RIGHT, TOP, BOTTOM = 64, 176, 40, 48

STEP = 0.2
"""Nats between two lines of the grid."""

LINES = {
    "data_parallel": ("data-parallel", "#222222", ""),
    "m1": ("DiLoCo, 1 silo", "#5778a4", ""),
    "m2": ("2 silos", "#6a9f58", ""),
    "m4": ("4 silos", "#e49444", ""),
    "m8": ("8 silos", "#d1615d", ""),
    "drop_half": ("8, half of messages lost", "#d1615d", "3 3"),
    "int4_h100": ("2, int4, H = 100", "#6a9f58", "3 3"),
    "data_parallel_muon": ("data-parallel, Muon", "#222222", "3 3"),
    "int4_h100_muon": ("2, int4, H = 100, Muon", "#857aab", "3 3"),
}
"""Name -> what is written at its line, colour, dashes."""


def plot(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the picture of the runs that are there; the axis of losses ends above what the first tokens cost."""
    curves = {name: found[name]["curve"] for name in LINES if name in found}
    last = max(tokens for curve in curves.values() for tokens, _ in curve)
    shown = [loss for curve in curves.values() for tokens, loss in curve if tokens > last / 8]
    low, high = floor(min(shown) / STEP) * STEP, (floor(max(shown) / STEP) + 1) * STEP

    def place(tokens: float, loss: float) -> tuple[float, float]:
        across = LEFT + tokens / last * (WIDTH - LEFT - RIGHT)
        return across, TOP + (high - loss) / (high - low) * (HEIGHT - TOP - BOTTOM)

    parts = [*frame(low, high, last, place)]
    heights = spread([place(last, curve[-1][1])[1] for curve in curves.values()])
    for (name, curve), height in zip(curves.items(), heights, strict=True):
        label, colour, dashes = LINES[name]
        points = " ".join("{:.1f},{:.1f}".format(*place(tokens, loss)) for tokens, loss in curve if loss <= high)
        stroke = f'stroke="{colour}" stroke-width="1.6" stroke-dasharray="{dashes}"'
        parts.append(f'<polyline points="{points}" fill="none" {stroke}/>')
        told = escape(f"{label}: {found[name]['loss']:.3f}")
        parts.append(f'<text x="{WIDTH - RIGHT + 6}" y="{height + 4:.1f}" fill="{colour}">{told}</text>')
    inside = "\n".join(parts)
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" '
        f'font-size="11">\n<rect width="100%" height="100%" fill="#fff"/>\n{inside}\n</svg>\n'
    )


def frame(low: float, high: float, last: float, place: Any) -> list[str]:
    """Return the axes and the title."""
    parts = [f'<text x="{LEFT}" y="22" font-size="13">Held-out loss (nats a token) over tokens read</text>']
    for number in range(round((high - low) / STEP) + 1):
        left, y = place(0, low + number * STEP)
        parts.append(f'<line x1="{left}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}" stroke="#ddd"/>')
        parts.append(f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{low + number * STEP:.1f}</text>')
    for quarter in range(5):
        x, y = place(last * quarter / 4, low)
        parts.append(f'<text x="{x:.1f}" y="{y + 18:.1f}" text-anchor="middle">{last * quarter / 4e6:.1f} M</text>')
    return parts


def spread(heights: Sequence[float], least: float = 14) -> list[float]:
    """Return heights in the same order, moved up where labels would stand on each other.

    >>> spread([10, 48, 50])
    [10, 36, 50]
    """
    moved, below = list(heights), float("inf")
    for place in sorted(range(len(moved)), key=moved.__getitem__, reverse=True):
        moved[place] = below = min(moved[place], below - least)
    return moved
