"""Prompts found by inference alone, on real sentiment: what federation buys, what is sent, how fast scoring is."""

from __future__ import annotations

import statistics
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import done, llama
from fedllm.app.config import read_recipe
from fedllm.core.seeds import generator
from fedllm.runtime.store import read_events
from fedllm.silo.candidates import Reader, scores_after
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import causal_loss
from fedllm.silo.reading import read
from fedllm.silo.scoring import log_likelihoods

ROOT = Path(__file__).resolve().parents[1]

SHORTER = ("evaluate.examples=50", "evaluate.every=1000")
"""Of each silo's held-out rows 50, before and after: a share of 0.75 is then good to 0.02 over all."""

BUDGETS = {
    "black_box": ("rounds=16", "algorithm.dim=16", "algorithm.population=12", "algorithm.examples=8"),
    "text_prompt": ("rounds=8",),
}
"""Less than the recipes' own, so that an hour of one core is enough for all silos together and each alone."""


def black_box_soft(data: Path, folder: Path) -> dict[str, Any]:
    """Run the soft prompt's search and each silo's own with the same budget; accuracies are shares."""
    return searched("black_box", "black_box_soft", data, folder)


def black_box_text(data: Path, folder: Path) -> dict[str, Any]:
    """Run the text prompt's search and each silo's own with the same budget; accuracies are shares."""
    return searched("text_prompt", "black_box_text", data, folder)


def searched(name: str, key: str, data: Path, folder: Path) -> dict[str, Any]:
    """Run a recipe, or go on with its run; return accuracy before, federated and alone (each on every silo's text)."""
    settings = [f"data.root='{data / 'polarity'}'", *SHORTER, *BUDGETS[name]]
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml", settings)
    events = read_events(done(recipe, folder))
    base = next(event for event in events if event["event"] == "base")
    rounds = [event for event in events if event["event"] == "round"]
    last = next(event for event in reversed(rounds) if event.get("accuracy"))
    alone = [mean(event["accuracy"]) for event in events if event["event"] == "alone"]
    most = max((event["bytes_up"] + event["bytes_down"]) / max(1, len(event["asked"])) for event in rounds)
    return {
        key: mean(last["accuracy"]),
        f"{key}_alone": statistics.mean(alone) if alone else None,
        f"{key}_before": mean(base["accuracy"]),
        f"{key}_alone_each": {event["silo"]: mean(event["accuracy"]) for event in events if event["event"] == "alone"},
        f"{key}_budget": BUDGETS[name],
        f"bytes_{name}": round(most),
        "seconds": round(sum(event["seconds"]["train"] for event in rounds)),
    }


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def scoring_speed(
    silos: int = 8,
    candidates: int = 20,
    examples: int = 64,
    layers: int = 4,
    hidden: int = 256,
    times: int = 3,
    batch_size: int = 16,
) -> dict[str, float]:
    """Score the candidates of a round with what they share read once, and one candidate at a time, in turn.

    Random tokens of the lengths of short reviews (32) after prompts of 20 tokens, two words of a token each. Naive is
    every prompt, example and word as a row of its own, in batches of 16, a candidate after the other.
    """
    model = llama(layers, hidden)
    with torch.no_grad():
        # Larger than at the start of training: an untrained model finds all words alike, and all scores the same.
        for value in model.parameters():
            value.mul_(2.0 if value.dim() == 2 else 1.0)
    draw = generator(0, "speed")
    prompts = torch.randint(3, 4096, (candidates, 20), generator=draw).tolist()
    texts = torch.randint(3, 4096, (silos, examples, 32), generator=draw).tolist()
    words = [(17,), (23,)]

    def fast() -> list[list[float]]:
        found = []
        for rows in texts:
            reader = Reader(model, words, 0, batch_size)
            _, before = read(model, prompts, None, 0, 19)
            each = [Example([*row, 17], [IGNORED] * len(row) + [17]) for row in rows]
            found.append(scores_after(reader, before, candidates, each, "loss").tolist())
        return found

    def naive() -> list[list[float]]:
        found = []
        for rows in texts:
            scores = []
            for prompt in prompts:
                each = [
                    Example([*prompt, *row, *word], [IGNORED] * (len(prompt) + len(row)) + list(word))
                    for row in rows
                    for word in words
                ]
                sums = log_likelihoods(model, each, causal_loss(), pad_id=0, batch_size=16)
                scores.append(-statistics.mean(sums[:: len(words)]))
            found.append(scores)
        return found

    ratios, errors = list[float](), list[float]()
    for _ in range(times):
        begun = time.perf_counter()
        quick = fast()
        between = time.perf_counter()
        slow = naive()
        ratios.append((time.perf_counter() - between) / (between - begun))
        errors.append(float((torch.tensor(quick) - torch.tensor(slow)).abs().max()))
    return {"scoring_speedup": statistics.median(ratios), "scoring_error": max(errors)}
