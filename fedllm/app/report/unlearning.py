"""What a run was made without, and how well that shows."""

from __future__ import annotations

from typing import Any

from fedllm.app.report.data import Run, is_number, part
from fedllm.app.report.words import number, plain

MODELS = {
    "base": "before any training",
    "before": "before forgetting",
    "after": "after forgetting",
    "retrained": "never learned from it",
}


def unlearning(run: Run) -> dict[str, Any]:
    """Return the report's section on what was removed, empty where nothing was."""
    said = run.certificate
    if not said:
        return {}
    removed, old, result = part(said, "removed"), part(said, "old"), part(said, "result")
    found, start = part(said, "verification"), part(said, "replayed_from")
    rows, signature = removed.get("rows"), part(said, "signature")
    what = f"{number(rows)} rows of silo {plain(removed.get('silo'))}" if rows else f"Silo {plain(removed.get('silo'))}"
    return {
        "what": what,
        "says": plain(said.get("says", ""), 300),
        "facts": [
            ["Old run, which still holds it until it is deleted", plain(old.get("run"))],
            [
                "Replayed",
                f"{number(said.get('rounds_replayed'))} rounds, from after round {number(start.get('round'))}",
            ],
            ["Checkpoint replayed from (SHA-256)", plain(start.get("checkpoint_sha256") or "the base model", 64)],
            ["Last checkpoint of this run (SHA-256)", plain(result.get("checkpoint_sha256"), 64)],
            ["Signed by the Ed25519 key", plain(signature.get("public_key") or "not signed", 64)],
        ],
        "why_not": plain(found["why_not"], 300) if found.get("why_not") else "",
        "rows": [
            [MODELS[name], *(number(row.get(key), 3) for key in ("loss", "loss_others", "auc", "auc_against_base"))]
            for name in MODELS
            if is_number((row := part(found, name)).get("auc"))
        ],
        "counts": f"{number(found.get('removed'))} removed and {number(found.get('held_out'))} held-out texts",
    }
