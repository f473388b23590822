"""One HTML file that says what an audit found, for the officer who has to decide whether it is too much."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedllm.app.report.audit_words import SECTIONS, Section, cards, epsilon, lead, sections
from fedllm.app.report.figure import COLOURS, Figure, axis, bars, figure, folded
from fedllm.app.report.page import HERE, policy, when
from fedllm.app.report.words import number, plain

AFTER = 10
"""Tensors shown after those that a recipe had best name."""


def render(result: Mapping[str, Any]) -> str:
    """Return the page of an audit, from what `privacy.json` has."""
    from plotly.offline import get_plotlyjs

    told = sections(result)
    plots = [plot(each) for each in told]
    parts = [{"section": each, "plot": made} for each, made in zip(told, plots, strict=True)]
    figures = [made for made in plots if made]
    pages = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    scripts = [get_plotlyjs().replace("\r\n", "\n"), (HERE / "page.js.j2").read_text(encoding="utf-8")]
    return pages.get_template("audit.html.j2").render(
        title=plain(result["run"], 80),
        when=when(result["time"]),
        lead=lead(result),
        cards=cards(result),
        parts=parts,
        figures=figures,
        epsilon=epsilon(result),
        texts=[shown(each) for each in result.get("texts", [])],
        noise=[plain(each, 240) for each in result["noise"]],
        open=[plain(each, 240) for each in result["open"]],
        facts=facts(result),
        tensors=tensors(result),
        specs=[made.spec for made in figures],
        policy=policy(scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )


def plot(section: Section) -> Figure | None:
    """Return found against chance, case by case, where a section has more than one number of a kind."""
    rows = [
        row for row in section.findings if row["measure"] == section.plotted and (row["says"] or not section.by_case)
    ]
    if not rows:
        return None
    scale = 100 if rows[0]["share"] else 1
    names = [folded(row["case"]) if section.by_case else folded(row["attack"]) for row in rows]
    places = list(range(len(rows)))
    values = [scale * row["found"]["value"] for row in rows]
    error = {
        "type": "data",
        "symmetric": False,
        "array": [scale * row["found"]["high"] - value for row, value in zip(rows, values, strict=True)],
        "arrayminus": [value - scale * row["found"]["low"] for row, value in zip(rows, values, strict=True)],
        "thickness": 1.2,
        "width": 3,
    }
    unit = " %" if scale == 100 else ""
    traces = [
        bars("found by attack", COLOURS["federated"], x=values, y=places, orientation="h", error_x=error,
             hovertemplate=f"%{{x:.1f}}{unit}<extra></extra>"),
        bars("chance", COLOURS["base"], x=[scale * row["chance"] for row in rows], y=places, orientation="h",
             hovertemplate=f"%{{x:.1f}}{unit}<extra></extra>"),
    ]  # fmt: skip
    return figure(
        section.plot_title,
        "The lines are 95 % intervals.",
        traces,
        90 + 52 * len(rows),
        x=axis(section.plotted + (", %" if unit else ""), rangemode="tozero"),
        y=axis(tickvals=places, ticktext=names, autorange="reversed", showgrid=False, zeroline=False),
        barmode="group",
        bargap=0.35,
    )


def shown(text: Mapping[str, Any]) -> dict[str, str]:
    """Return a record and what was had back of it."""
    named = " · ".join(plain(piece, 20) for piece in text["named"])
    return {
        "text": plain(text["text"], 400),
        "built": plain(text["built"], 400) if text["built"] else "",
        "named": named,
    }


def tensors(result: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the tensors as rows: those that a recipe had best name, and some that come after them."""
    each = result.get("tensors", {}).get("each", [])
    named = sum(one["named"] for one in each)
    rows = [
        {
            "name": plain(one["name"], 100),
            "values": f"{one['values']:.2%}",
            "sensitivity": f"{one['sensitivity']:.2%}",
            "named": "yes" if one["named"] else "",
        }
        for one in each[: named + AFTER]
    ]
    more = len(each) - len(rows)
    rest = {"name": f"… {more} more, in privacy.json", "values": "", "sensitivity": "", "named": ""}
    return [*rows, rest] if more else rows


def facts(result: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return what was attacked and how."""
    names = [section.title for key, section in SECTIONS.items() if key in result["attacks"]]
    return [
        ("Model", plain(result["model"])),
        ("What was trained", plain(result["trainable"])),
        ("Silos", f"{number(result['silos'])} with {number(result['examples'])} examples"),
        ("Attacks", ", ".join(names)),
        ("Records attacked", f"{number(result['trials'])}, cut to {number(result['tokens'])} tokens"),
        *([("Descent on gradients", plain(result["descent"], 120))] if "updates" in result["attacks"] else []),
        ("Texts for membership", f"{number(result['rows'])} of each kind at most"),
        ("Seed", str(result["seed"])),
    ]
