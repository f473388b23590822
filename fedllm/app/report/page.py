"""One HTML file that says what a run has found, for the engineer and for the officer who must approve it."""

from __future__ import annotations

import base64
import hashlib
import os
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup

from fedllm.app.report import cleaning, costs, parts, plots
from fedllm.app.report import wire as on_wire
from fedllm.app.report.data import Run, compare, read_run
from fedllm.app.report.privacy import privacy
from fedllm.app.report.unlearning import unlearning
from fedllm.app.report.words import facts, lead, number, plain

HERE = Path(__file__).parent


def write_report(run: Path) -> Path:
    """Write `report.html` into a run folder, finished or not, and return its path."""
    page = render(read_run(run))
    target = run / "report.html"
    draft = run / f".report.{os.getpid()}.tmp"
    try:
        draft.write_bytes(page.encode("utf-8", errors="replace"))
        draft.replace(target)
    finally:
        draft.unlink(missing_ok=True)
    return target


def render(run: Run) -> str:
    """Return the page of a run."""
    from plotly.offline import get_plotlyjs

    found, refused = compare(run), on_wire.dropped(run)
    drawn = {
        "comparison": plots.comparison(found),
        "gains": plots.gains(found),
        "history": plots.history(run),
        "matrix": plots.matrix(found),
        "holds": costs.holds(run),
        "seconds": costs.seconds(run),
        "traffic": costs.traffic(run),
        "error": costs.error(run, "aggregation_error"),
        "truncation": costs.error(run, "truncation_error"),
    }
    figures = [made for made in drawn.values() if made]
    pages = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, keep_trailing_newline=True
    )
    scripts = [get_plotlyjs().replace("\r\n", "\n"), (HERE / "page.js.j2").read_text(encoding="utf-8")]
    texts: dict[str, Any] = {
        "title": plain(run.start.get("name", "Unnamed run"), 80),
        "when": when(run.start.get("time")),
        "status": status(run),
        "lead": lead(run, found),
        "cards": parts.cards(found),
        "table": parts.table(found),
        "accuracy": parts.table(compare(run, "accuracy"), higher=True),
        "forgetting": parts.table(compare(run, "general")),
        "cleaning": cleaning.table(run),
        "note": on_wire.note(run),
        "holdings": parts.holdings(run),
        "cost": parts.cost(run),
        "times": parts.times(run),
        "dropped": refused[: parts.ENDS],
        "dropped_more": max(0, len(refused) - parts.ENDS),
        "refusals": on_wire.refusals(run),
        "wire": on_wire.wire(run),
        "claim": on_wire.claim(run),
        "privacy": privacy(run),
        "unlearning": unlearning(run),
        "scores": parts.scores(run),
        "facts": parts.about(run),
        "recipe": run.recipe.strip(),
        "steps": [step | {"facts": facts(step.get("facts"))} for step in on_wire.steps(run)],
    }
    return pages.get_template("page.html.j2").render(
        **texts,
        plots=drawn,
        figures=figures,
        specs=[made.spec for made in figures],
        policy=policy(scripts),
        scripts=[Markup(script) for script in scripts],
        style=Markup((HERE / "page.css").read_text(encoding="utf-8")),
    )


def policy(scripts: list[str]) -> str:
    """Return the content policy under which a browser runs only these scripts and fetches nothing."""
    digests = (base64.b64encode(hashlib.sha256(script.encode()).digest()).decode() for script in scripts)
    allowed = " ".join(f"'sha256-{digest}'" for digest in digests)
    return f"default-src 'none'; script-src {allowed}; style-src 'unsafe-inline'; img-src data: blob:"


def when(time: object) -> str:
    """Return an ISO time to the minute, or as it stands where it is something else."""
    text = plain(time, 40) if time else ""
    return f"{text[:10]} {text[11:16]} UTC" if len(text) == 20 and text.endswith("Z") else text


def status(run: Run) -> str:
    """Say that a run has not finished, or nothing."""
    if run.done:
        return ""
    done, planned = (run.rounds[-1]["round"] if run.rounds else 0), number(run.start.get("rounds"))
    return f"This run has not finished: round {done} of {planned}. Continue it with: fedllm resume"
