"""Run the attacks that are wanted and write what they found into the run's folder."""

from __future__ import annotations

import json
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.app.audits.case import Case, open_case, recipe_in
from fedllm.app.audits.descents import how_far
from fedllm.app.audits.findings import Finding
from fedllm.app.audits.learned import Bound, membership, secrets_kept
from fedllm.app.audits.tensors import most_sensitive
from fedllm.app.audits.updates import Recovered, attack_updates
from fedllm.app.audits.whose import whose
from fedllm.app.privacy import is_private, open_ends, said, uses
from fedllm.app.progress import Ui
from fedllm.app.report.audit import render
from fedllm.app.report.audit_words import lead
from fedllm.core.errors import FedllmError, nearest
from fedllm.runtime.store import write_text

ATTACKS = ("updates", "membership", "canaries", "origin", "tensors")
"""What an audit does; the last is no attack, but says which tensors tell the most."""

SHOWN = 3
"""Texts that are shown beside what was recovered, where that is asked for."""


class Wanted(NamedTuple):
    """What an audit does: which `attacks` (none named: all), how often, on how much text, from which seed."""

    attacks: Sequence[str] = ()
    trials: int = 16
    tokens: int = 24
    rows: int = 256
    seed: int = 0
    show_text: bool = False


def audit(folder: Path, wanted: Wanted, ui: Ui) -> tuple[Path, list[str]]:
    """Attack a finished run of this machine; write `privacy.json` and `privacy.html` into it.

    Returns the page, and what it says first.
    """
    for name in wanted.attacks:
        if name not in ATTACKS:
            raise FedllmError(f"--attack '{name}' is unknown; {nearest(name, ATTACKS)}")
    attacks = wanted.attacks or ATTACKS
    recipe = recipe_in(folder)
    if "canaries" in wanted.attacks and recipe.canaries is None:
        raise FedllmError(
            f"The run '{folder}' planted no canaries; run its recipe with a table [canaries], such as "
            "--set canaries.count=16, and audit that run."
        )
    with ui as shown:
        case = open_case(folder, wanted.seed, wanted.trials, wanted.tokens, wanted.rows, shown)
        findings, texts, bound = list[Finding](), list[Recovered](), None
        if "updates" in attacks:
            found, texts = attack_updates(case)
            findings += found
        if "membership" in attacks:
            findings += membership(case)
        if "canaries" in attacks:
            found, bound = secrets_kept(case)
            findings += found
        if "origin" in attacks:
            findings += whose(case)
        result = told(case, attacks, findings, bound)
        if "tensors" in attacks:
            result["tensors"] = most_sensitive(case)
        if wanted.show_text:
            result["texts"] = [legible(case, each) for each in texts[:SHOWN]]
    write_text(folder / "privacy.json", json.dumps(result, indent=1) + "\n")
    write_text(folder / "privacy.html", render(result))
    return folder / "privacy.html", lead(result)


def told(case: Case, attacks: Sequence[str], findings: Sequence[Finding], bound: Bound | None) -> dict[str, Any]:
    """Return all that an audit found, as JSON."""
    recipe, silos = case.recipe, case.parts.silos
    examples = {name: len(silos.examples(name)["train"]) for name in silos.names}
    private = is_private(recipe)
    return {
        "run": recipe.name,
        "time": datetime.now(UTC).strftime("%Y-%m-%dT%H:%M:%SZ"),
        "model": Path(recipe.model).name,
        "trainable": case.parts.trainable.name,
        "silos": len(silos.names),
        "examples": sum(examples.values()),
        "seed": case.seed,
        "trials": case.trials,
        "tokens": case.tokens,
        "rows": case.rows,
        "attacks": list(attacks),
        "descent": how_far(case),
        "sum_only": case.sum_only,
        "encrypted": recipe.homomorphic is not None,
        "noise": said(uses(recipe, len(silos.names), examples if private else {})) if private else [],
        "open": open_ends(recipe) if private else [],
        "at_server": any(use.by == "server" for use in uses(recipe, len(silos.names))) if private else False,
        "findings": [finding.told() for finding in findings],
        "epsilon": epsilon_told(bound),
    }


def epsilon_told(bound: Bound | None) -> dict[str, Any] | None:
    """Return the two bounds on epsilon as JSON."""
    if bound is None:
        return None
    return {**bound._asdict(), "told": bound.told._asdict()}


def legible(case: Case, trial: Recovered) -> dict[str, Any]:
    """Return a record beside what was recovered of it, as text."""
    decode = case.parts.tokenizer.decode
    pieces = [decode([token]) for token in trial.named]
    return {"text": decode(trial.text), "named": pieces, "built": decode(trial.built)}
