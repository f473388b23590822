"""Prompts found by inference alone, on real sentiment: what federation buys, what is sent, how fast scoring is.

`python -m benchmarks.prompts_blackbox FOLDER` with `train.jsonl.gz` of `text` and `label` in FOLDER.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

import fedllm
from benchmarks.common import keep, llama
from fedllm.app.config import read_recipe
from fedllm.core.seeds import generator
from fedllm.runtime.store import read_events
from fedllm.silo.candidates import Reader, scores_after
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import causal_loss
from fedllm.silo.reading import read
from fedllm.silo.scoring import log_likelihoods

ROOT = Path(__file__).resolve().parents[1]


def black_box_soft(folder: Path, settings: tuple[str, ...] = ()) -> dict[str, float]:
    """Run the soft prompt's search and each silo's own with the same budget; accuracies are shares."""
    return searched("black_box", folder, settings)


def black_box_text(folder: Path, settings: tuple[str, ...] = ()) -> dict[str, float]:
    """Run the text prompt's search and each silo's own with the same budget; accuracies are shares."""
    return searched("text_prompt", folder, settings)


def searched(name: str, folder: Path, settings: tuple[str, ...]) -> dict[str, float]:
    """Run a recipe; return accuracy before, federated and alone (each on every silo's text), and bytes."""
    recipe = read_recipe(ROOT / "recipes" / f"{name}.toml", [f"data.root={folder}", *settings])
    with tempfile.TemporaryDirectory() as place:
        begun = time.perf_counter()
        events = read_events(fedllm.run(recipe, Path(place) / "run"))
        seconds = time.perf_counter() - begun
    base = next(event for event in events if event["event"] == "base")
    rounds = [event for event in events if event["event"] == "round"]
    last = next(event for event in reversed(rounds) if event.get("accuracy"))
    alone = [mean(event["accuracy"]) for event in events if event["event"] == "alone"]
    most = max((event["bytes_up"] + event["bytes_down"]) / max(1, len(event["asked"])) for event in rounds)
    return {
        "zero_shot": mean(base["accuracy"]),
        "accuracy": mean(last["accuracy"]),
        "alone": statistics.mean(alone) if alone else float("nan"),
        "bytes": most,
        "seconds": seconds,
    }


def mean(values: Mapping[str, float]) -> float:
    return sum(values.values()) / len(values)


def scoring_speed(
    silos: int = 8, candidates: int = 20, examples: int = 64, layers: int = 4, hidden: int = 256, times: int = 3
) -> dict[str, float]:
    """Score the candidates of a round with what they share read once, and one candidate at a time, in turn.

    Random tokens of the lengths of short reviews (32) after prompts of 20 tokens, two words of a token each. Naive is
    every prompt, example and word as a row of its own, in batches of 16, a candidate after the other.
    """
    model = llama(layers, hidden)
    draw = generator(0, "speed")
    prompts = torch.randint(3, 4096, (candidates, 20), generator=draw).tolist()
    texts = torch.randint(3, 4096, (silos, examples, 32), generator=draw).tolist()
    words = [(17,), (23,)]

    def fast() -> list[list[float]]:
        found = []
        for rows in texts:
            reader = Reader(model, words, 0, 64)
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--set", action="append", default=[], help="a recipe's setting, for both searches")
    asked = parser.parse_args()
    settings = tuple(asked.set)
    soft, text = black_box_soft(asked.folder, settings), black_box_text(asked.folder, settings)
    result: dict[str, Any] = {
        "zero_shot": soft["zero_shot"],
        "black_box_soft": soft["accuracy"],
        "black_box_soft_alone": soft["alone"],
        "black_box_text": text["accuracy"],
        "black_box_text_alone": text["alone"],
        "bytes_black_box": soft["bytes"],
        "bytes_black_box_text": text["bytes"],
        **scoring_speed(),
    }
    print(json.dumps({"seconds_soft": soft["seconds"], "seconds_text": text["seconds"]}))
    keep("prompts_blackbox", result)


if __name__ == "__main__":
    main()
