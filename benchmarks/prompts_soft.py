"""The soft prompt of `recipes/prompt.toml` on polarity's test: before, federated, and each silo alone.

All are looked at on the same 400 rows, drawn once: a share of 0.8 is then good to 0.02 (one standard error).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import done
from fedllm.app.build import Parts, build
from fedllm.app.config import Recipe, read_recipe
from fedllm.core.seeds import generator
from fedllm.core.tensors import subtract
from fedllm.core.types import Request, Silo, Tensors
from fedllm.runtime.store import load_checkpoint
from fedllm.silo.examples import Example
from fedllm.silo.sources import read_rows

RECIPE = Path(__file__).resolve().parents[1] / "recipes" / "prompt.toml"

TEST_ROWS = 400


def soft(data: Path, folder: Path) -> dict[str, Any]:
    """Run the recipe, then each silo alone with as many steps; what is in `folder` is not done again."""
    polarity = data / "polarity"
    recipe = read_recipe(RECIPE, [f"data.root='{polarity}'", "evaluate.alone=false", "evaluate.every=1000"])
    trained_params = federated(recipe, folder / "federated")
    parts = build(recipe)
    rows = read_rows(polarity / "test.jsonl.gz")
    drawn = torch.randperm(len(rows), generator=generator(0, "test rows"))[:TEST_ROWS]
    rows = [rows[place] for place in drawn.tolist()]
    test = parts.task.prepare(rows, "polarity's test").examples
    file = folder / "known.json"
    known: dict[str, Any] = json.loads(file.read_text()) if file.exists() else {}

    def told(name: str, measure: Callable[[], dict[str, float]]) -> dict[str, float]:
        if name not in known:
            known[name] = measure()
            file.write_text(json.dumps(known, indent=1))
            print(f"{name}: {known[name]}", file=sys.stderr, flush=True)
        return dict(known[name])

    base = told("base", lambda: look(parts, test, parts.params, base=1.0))
    start = told("start", lambda: look(parts, test, parts.params))
    learned = told("federated", lambda: look(parts, test, trained_params))
    steps = recipe.rounds * parts.work().steps(parts.silos.examples(parts.silos.names[0]))
    alone = {name: told(name, lambda name=name: lone(parts, name, steps, test)) for name in parts.silos.names}
    metrics = json.loads((folder / "federated" / "metrics.json").read_text())
    calls = recipe.rounds * len(parts.silos.names)
    return {
        "zero_shot": base["accuracy"],
        "zero_shot_calibrated": base["calibrated"],
        "prompt_as_text": start["accuracy"],
        "soft": learned["accuracy"],
        "soft_calibrated": learned["calibrated"],
        "soft_alone": sum(each["accuracy"] for each in alone.values()) / len(alone),
        "soft_alone_each": {name: each["accuracy"] for name, each in alone.items()},
        "bytes_soft": max(parts.plan.bytes_up, parts.plan.bytes_down),
        "bytes_soft_on_the_wire": round((metrics["bytes_up"] + metrics["bytes_down"]) / calls / 2),
        "test_rows": len(test),
        "rounds": recipe.rounds,
        "steps_a_silo": steps,
        "train_seconds": metrics["train_seconds"],
    }


def federated(recipe: Recipe, folder: Path) -> Tensors:
    """Run the recipe, or go on with its run, and return what it learned."""
    kept = load_checkpoint(done(recipe, folder))
    assert kept is not None
    return kept.state.params


def look(parts: Parts, test: Sequence[Example], params: Tensors, **asked: float) -> dict[str, float]:
    """Return how often the parameters are right on the test, as it is and calibrated."""
    silo = Silo("test", parts.model, {"train": [], "test": test}, {}, 0)
    reply, _ = parts.evaluator(Request("test", 0, "evaluate", params, asked), silo)
    return {key: reply.scalars[key] for key in ("accuracy", "calibrated", "loss")}


def lone(parts: Parts, name: str, steps: int, test: Sequence[Example]) -> dict[str, float]:
    """Train one silo alone for as many steps as in all rounds, with one optimiser, and look at what it learned."""
    silo = parts.open_silo(lambda tokens: None)(name)
    reply, _ = parts.work(steps=steps, epochs=None).client(Request(name, 0, "train", parts.params), silo)
    return look(parts, test, subtract(parts.params, reply.tensors))
