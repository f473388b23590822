"""What it costs that a silo comes late, leaves and returns, is five times slower, or that half of all replies are lost.

    python -m benchmarks.elastic [FOLDER]

Four eras of speeches, a Llama from nothing (`recipes/pretrain.toml`, smaller), all runs from one start. One era, the
latest, is the silo in question. Runs stand in FOLDER (runs/elastic) and go on there when this is started again.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import fedllm
from benchmarks.common import keep
from fedllm.app.config import read_recipe
from fedllm.runtime.store import read_events

RECIPE = Path(__file__).parent.parent / "recipes" / "pretrain.toml"
SILO = "1957_2026"
SIZE = {
    "rounds": 10,
    "threads": 1,
    "client.steps": 20,
    "task.block": 64,
    "data.limit_test": 16,
    "evaluate": {"every": 10, "alone": False, "pooled": False},
}
START = {"depth": 2, "context": 64, "vocab": 1024}
CASES: dict[str, dict[str, Any] | None] = {
    "all": None,
    "late": {"silos": {SILO: {"from": 6}}},
    "return": {"silos": {SILO: {"away": [[4, 7]]}}},
    "slow": {"silos": {SILO: {"slow": 5}}},
    "drop_half": {"drop": 0.5},
}
"""What a run says of availability, by what it is called."""


def recipe(case: str, start: Path | None) -> Any:
    """Return the recipe of a case: one that makes the start, or that begins from it."""
    table: dict[str, Any] = read_recipe(RECIPE).model_dump(exclude_none=True)
    for key, value in SIZE.items():
        inner, _, last = key.rpartition(".")
        (table[inner] if inner else table)[last] = value
    table |= {"links": None, "scratch": None if start else START, "availability": CASES[case]}
    return read_recipe({**table, **({"model": str(start)} if start else {})})


def done(folder: Path, case: str, start: Path | None) -> dict[str, Any]:
    """Run a case, or go on with it; return its events by kind, the last of each."""
    if (folder / "recipe.toml").exists():
        events = {event["event"]: event for event in read_events(folder)}
        if "done" in events:
            return events
        fedllm.resume(folder)
    else:
        fedllm.run(recipe(case, start), folder)
    return {event["event"]: event for event in read_events(folder)}


def main() -> None:
    """Run all cases and keep what they cost."""
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/elastic")
    result, start, whole = dict[str, Any](), None, 0.0
    for case in CASES:
        events = done(place / case, case, start)
        start = (place / "all" / "start").absolute()
        losses, rounds = events["round"]["loss"], read_events(place / case)
        result[f"loss_{case}"] = round(sum(losses.values()) / len(losses), 4)
        result[f"loss_{case}_silo"] = round(losses[SILO], 4)
        result[f"replies_{case}"] = sum(event["clients"] for event in rounds if event["event"] == "round")
        result[f"tokens_{case}"] = sum(event["tokens"] for event in rounds if event["event"] == "round")
        whole = whole or result["loss_all"]
        result[f"price_{case}"] = round(result[f"loss_{case}"] / whole - 1, 4)
        print(f"{case}: {json.dumps({key: value for key, value in result.items() if case in key})}", flush=True)
    keep("elastic", result)


if __name__ == "__main__":
    main()
