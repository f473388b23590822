"""What an epsilon costs nine institutions that hide each record: noise shared out in a secure sum, or all of it each.

All run the same number of rounds. Without noise each institution takes four AdamW steps of its own on 8 records a round
(`free`); with noise it sends the sum of its records' clipped gradients, of more records to drown the noise, and the
server takes one Adam step a round. Rates, clip and batch were chosen by a few probes on the same held-out text. Every
institution draws its records with one probability, so that one epsilon holds for all, and every record counts alike;
alone each institution adds all of the noise.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import done
from fedllm.app.config import read_recipe
from fedllm.runtime.store import read_events

SILOS = ("cancergov", "cdc", "gard", "ghr", "mplus", "nhlbi", "niddk", "ninds", "seniorhealth")
DELTA = 1e-5
ROUNDS, RATE, TOKENS = 60, 0.05, 64
EACH = 82
"""Records of a silo in a round, on the average over the silos."""

FREE = {"client": {"steps": 4, "batch_size": 8, "learning_rate": 1e-2}}


def in_sum(epsilon: float) -> dict[str, Any]:
    """Return what a run has of its own where the silos add noise together."""
    return {
        "client": {
            "name": "dp_sgd",
            "noise_in": "sum",
            "rate": RATE,
            "batch_size": EACH,
            "micro_batch": 16,
            "steps": 1,
            "clip": 0.3,
            "learning_rate": 1.0,
        },
        "secure": {"drop_outs": 1, "largest_weight": 1, "losses": True},
        "optimiser": {"name": "fedadam", "learning_rate": 1e-2, "tau": 1e-4},
        "privacy": {"delta": DELTA, "target_epsilon": epsilon},
    }


def each_alone(epsilon: float) -> dict[str, Any]:
    """Return the same where each silo adds all the noise and the server sees its update."""
    made = in_sum(epsilon)
    client = {key: value for key, value in made["client"].items() if key != "noise_in"}
    weighted = {"name": "mean", "weights": "examples"}
    return {**made, "client": {**client, "optimiser": "sgd"}, "aggregate": weighted, "secure": None}


KINDS: Mapping[str, dict[str, Any]] = {
    "free": FREE,
    "eps8": in_sum(8.0),
    "eps3": in_sum(3.0),
    "eps1": in_sum(1.0),
    "eps8_each_alone": each_alone(8.0),
}


def utility(data: Path, folder: Path) -> dict[str, Any]:
    """Run every kind, or go on with it; return losses and what is kept of the gain without noise."""
    losses = {name: mean_loss(done(recipe(data, own), folder / f"utility_{name}")) for name, own in KINDS.items()}
    base = mean_loss(folder / "utility_free", "base")
    gain = base - losses["free"]
    kept = {f"gain_kept_{name}": round((base - loss) / gain, 4) for name, loss in losses.items() if name != "free"}
    return {
        **kept,
        "utility_loss_base": round(base, 4),
        **{f"utility_loss_{name}": round(loss, 4) for name, loss in losses.items()},
        "utility_noise": {name: noise_of(folder / f"utility_{name}") for name in KINDS if name != "free"},
        "utility_setting": {"rounds": ROUNDS, "rate": RATE, "tokens": TOKENS, "delta": DELTA, "silos": len(SILOS)},
    }


def recipe(data: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of one run."""
    made = {
        "model": str(data / "models" / "stories260k"),
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "rounds": ROUNDS,
        "silos": {
            name: {part: str((data / "medquad" / f"{name}.{part}.jsonl.gz").absolute()) for part in ("train", "test")}
            for name in SILOS
        },
        "data": {"limit_test": 40},
        "task": {"name": "instruct", "max_tokens": TOKENS},
        "trainable": {"name": "lora", "r": 4, "alpha": 8},
        "aggregate": {"name": "mean", "weights": "uniform"},
        "evaluate": {"every": ROUNDS, "alone": False},
        **own,
    }
    return {key: value for key, value in made.items() if value is not None}


def mean_loss(folder: Path, kind: str = "round") -> float:
    """Return the mean over the silos of a run's last held-out loss, or of the model it began with."""
    each = [event["loss"] for event in read_events(folder) if event["event"] == kind and event.get("loss")][-1]
    return float(sum(each.values()) / len(each))


def noise_of(folder: Path) -> float | None:
    """Return the noise multiplier that a run's recipe came to, where it is the same for all."""
    found = read_recipe(folder / "recipe.toml").client.get("noise")
    return None if found is None else round(float(found), 4)
