"""Seventy-seven intents at ten silos, each with its own: how often each silo's are told right, alone and together."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.common import done
from fedllm.app.config import read_recipe
from fedllm.runtime.store import read_events

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "intents.toml"

SHORTER = ("rounds=4", "evaluate.every=4", "data.limit_test=6")
"""Fewer rounds than the recipe's twenty, and fewer held-out rows than its eight: an hour of one core is enough."""


def intents(data: Path, folder: Path, settings: Sequence[str] = SHORTER) -> dict[str, Any]:
    """Run the recipe, or go on with its run; accuracies are shares of held-out rows, among all words.

    A silo alone takes as many steps as in all rounds. It is looked at on its own intents, which is what `alone` says of
    each, and on those of all silos.
    """
    recipe = read_recipe(RECIPE, [f"data.root='{data / 'banking77'}'", *settings])
    events = read_events(done(recipe, folder))
    start, base = (next(event for event in events if event["event"] == kind) for kind in ("start", "base"))
    last = [event for event in events if event["event"] == "round"][-1]
    alone = {event["silo"]: event["accuracy"] for event in events if event["event"] == "alone"}
    own = {name: found[name] for name, found in alone.items()}
    return {
        "intents": mean(last["accuracy"]),
        "intents_each": last["accuracy"],
        "intents_alone": mean(own),
        "intents_alone_each": own,
        "intents_alone_everywhere": statistics.mean(mean(found) for found in alone.values()),
        "intents_without_own": mean(last["without_own"]["accuracy"]),
        "intents_calibrated": mean(last["calibrated"]),
        "intents_before": mean(base["accuracy"]),
        "intents_before_calibrated": mean(base["calibrated"]),
        "intents_rows": sum(held["test"] for held in start["silos"].values()),
        "intents_rounds": last["round"],
        "bytes_intents": start["plan"]["bytes_up"],
    }


def mean(values: Mapping[str, float]) -> float:
    return statistics.mean(values.values())
