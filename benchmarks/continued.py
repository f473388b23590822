"""Continued pre-training of SmolLM2 on five domains: what federated training keeps of the perplexity that pooled gains.

recipes/continue.toml is run as it stands: five silos of very different text, many short rounds, plain averaging. The
comparison is training in one place on the silos' very batches side by side: the same tokens, the same number of steps,
the same learning rate over them. What was forgotten is the perplexity of WikiText-2, which no silo has.

    python -m benchmarks.continued [--data FOLDER] [--out FOLDER] [--set KEY=VALUE ...]

The goal is 95 % of the gain at every silo. A run that is killed goes on from its last round.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import fedllm
from benchmarks.common import RESULTS, machine
from fedllm.app.progress import Ui
from fedllm.app.results import gain_kept as share_kept
from fedllm.app.results import read_metrics

ROOT = Path(__file__).resolve().parents[1]
KEPT = RESULTS / "pretrain" / "continued.json"
GOAL = 0.95


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument(
        "--data", type=Path, default=ROOT.parent / "shared" / "data", help="folder of the recipe's files"
    )
    asked.add_argument("--out", type=Path, default=Path("runs") / "benchmark-continued")
    asked.add_argument("--set", action="append", default=[], help="another setting of the recipe, for a trial")
    given = asked.parse_args()
    settings = [f"data.root={given.data.absolute()}", *given.set]
    if (given.out / "recipe.toml").exists():
        fedllm.resume(given.out, ui=Ui(None))
    else:
        fedllm.run(ROOT / "recipes" / "continue.toml", given.out, settings, ui=Ui(None))
    found = result(read_metrics(given.out))
    if not given.set:
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        told = {"command": "python -m benchmarks.continued", "machine": machine(), **found}
        KEPT.write_text(json.dumps(told, indent=1) + "\n", encoding="utf-8")
    print(json.dumps(found))


def result(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Return the figures of a finished run."""
    kept = share_kept(metrics["loss"])
    return {
        "gain_kept": {name: round(share, 4) for name, share in kept.items()},
        "goal": GOAL,
        "reached": min(kept.values()) >= GOAL,
        "perplexity": perplexities(metrics["loss"]),
        "forgetting": perplexities(metrics["general"]),
        "tokens": metrics["tokens"],
        "rounds": metrics["rounds"],
        "minutes": round(metrics["seconds"] / 60, 1),
    }


def perplexities(losses: Mapping[str, Mapping[str, float]]) -> dict[str, dict[str, float]]:
    """Return the perplexity of each text under each condition."""
    return {kind: {name: round(math.exp(loss), 3) for name, loss in each.items()} for kind, each in losses.items()}


def gain_kept() -> dict[str, Any]:
    """Return `gain_kept` and `forgetting` of the run whose result is kept, or null for each."""
    told = json.loads(KEPT.read_text(encoding="utf-8")) if KEPT.exists() else {}
    return {key: told.get(key) for key in ("gain_kept", "forgetting")}


if __name__ == "__main__":
    main()
