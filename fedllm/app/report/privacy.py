"""What a run guarantees to whom, in numbers and in words that an officer can act on."""

from __future__ import annotations

from typing import Any

from fedllm.app.report.data import Run, is_number, losses, part
from fedllm.app.report.parts import ALL
from fedllm.app.report.words import number, plain

HIDES = {
    "silo": "Whether any one silo took part at all, with everything that it has,",
    "record": "Whether any one record was among a silo's training text",
}
ADDED = {
    "server": "The server adds the noise: it is trusted, and sees each silo's update without any.",
    "silo": "Each silo adds the noise before anything leaves it, so that the server need not be trusted.",
}


def privacy(run: Run) -> dict[str, Any]:
    """Return the report's section on differential privacy, empty where there is none."""
    said = part(run.done, "privacy")
    claims = said.get("claims")
    made = [told(claim, said) for claim in claims if isinstance(claim, dict)] if isinstance(claims, list) else []
    opened = said.get("open")
    return {
        "claims": made,
        "so_far": "" if made else so_far(run),
        "open": [plain(each, 200) for each in opened] if isinstance(opened, list) else [],
        "stopped": plain(run.metrics.get("stopped", ""), 200) if run.metrics.get("stopped") else "",
    }


def told(claim: dict[str, Any], said: dict[str, Any]) -> dict[str, Any]:
    """Return one guarantee as text."""
    unit, delta = str(claim.get("unit")), said.get("delta")
    by = claim.get("by")
    bounds = [f"{name} {number(claim.get(key))}" for name, key in METHODS if is_number(claim.get(key))]
    each = sorted(losses(claim.get("silos")).items(), key=lambda pair: -pair[1])
    return {
        "epsilon": number(claim.get("epsilon")),
        "delta": f"{delta:.0e}" if is_number(delta) else "",
        "hides": HIDES.get(unit, plain(claim.get("hides", unit))),
        "by": [ADDED[name] for name in by if name in ADDED] if isinstance(by, list) else [],
        "bounds": ", ".join(bounds),
        "uses": [use(each) for each in claim.get("uses", []) if isinstance(each, dict)][:ALL],
        "silos": [[plain(name), number(value)] for name, value in each[:ALL]],
        "more": max(0, len(each) - ALL),
    }


METHODS = (("Rényi divergence", "rdp"), ("privacy loss distribution", "pld"))


def use(each: dict[str, Any]) -> list[str]:
    """Return one kind of look at the text: what, the noise, how it was drawn, how often."""
    drawn = {
        "poisson": f"each by chance, at rate {number(each.get('rate'), 4)}",
        "fixed": f"{number(each.get('size'), 0)} of {number(each.get('of'), 0)} by chance",
    }
    return [
        plain(each.get("what", "")),
        f"{plain(each.get('noise', ''))}, {number(each.get('multiplier'), 3)} x the bound",
        drawn.get(str(each.get("sampling")), "all"),
        number(each.get("times"), 0),
    ]


def so_far(run: Run) -> str:
    """Say what a run that has not finished has spent."""
    spent = losses(run.rounds[-1].get("epsilon")) if run.rounds else {}
    return "; ".join(f"epsilon {number(value)} of a {plain(unit)} so far" for unit, value in spent.items())
