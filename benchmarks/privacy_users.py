"""What it costs to hide a whole user among a thousand: noise at the server at epsilon 8, 3 and 1, and none.

MedQuAD's records with a short question are dealt out to 1,000 users, each with a mixture of its nine institutions of
its own (Dirichlet, alpha 1): nine records to learn from and one held out. Each user takes part in a round by the toss
of a coin, of which only the server knows. What is hidden is whether a user takes part at all, with all that it has.

All run the same number of rounds with as many users a round, as cohorts. Without noise a user takes two AdamW steps and
the server averages (`free`); with noise it sends one gradient over eight of its records, which is clipped, and the
server takes an Adam step. Rates and clip were chosen by a few probes on the same held-out text.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from benchmarks.common import done
from benchmarks.privacy_utility import DELTA, SILOS, mean_loss
from fedllm.app.config import read_recipe

USERS, RATE, ROUNDS, TOKENS = 1000, 0.2, 40, 64
QUESTION = 56
"""Characters of a question at most, so that among the tokens of a record there is some of its answer."""
LOOKED = 200
"""Users whose held-out records are looked at before and after."""

FREE = {"client": {"steps": 2, "batch_size": 8, "learning_rate": 1e-2}}


def noised(epsilon: float) -> dict[str, Any]:
    """Return what a run has of its own where the server adds noise for a whole run's epsilon."""
    return {
        "client": {"optimiser": "sgd", "steps": 1, "batch_size": 8, "learning_rate": 1.0, "max_grad_norm": 0.0},
        "transforms": [{"name": "central_dp", "max_norm": 0.3}],
        "optimiser": {"name": "fedadam", "learning_rate": 1e-2, "tau": 1e-4},
        "privacy": {"delta": DELTA, "target_epsilon": epsilon},
    }


KINDS: Mapping[str, dict[str, Any]] = {"free": FREE, "eps8": noised(8.0), "eps3": noised(3.0), "eps1": noised(1.0)}


def users(data: Path, folder: Path) -> dict[str, Any]:
    """Run every kind, or go on with it; return losses and what is kept of the gain without noise."""
    rows = joined(data, folder / "users.jsonl.gz")
    losses = {name: mean_loss(done(recipe(data, rows, own), folder / f"users_{name}")) for name, own in KINDS.items()}
    base = mean_loss(folder / "users_free", "base")
    gain = base - losses["free"]
    kept = {
        f"users_gain_kept_{name}": round((base - loss) / gain, 4) for name, loss in losses.items() if name != "free"
    }
    return {
        **kept,
        "users_loss_base": round(base, 4),
        **{f"users_loss_{name}": round(loss, 4) for name, loss in losses.items()},
        "users_noise": {name: noise_of(folder / f"users_{name}") for name in KINDS if name != "free"},
        "users_setting": {"users": USERS, "rounds": ROUNDS, "rate": RATE, "tokens": TOKENS, "delta": DELTA},
    }


def joined(data: Path, file: Path) -> Path:
    """Write the short records of all institutions into one file, each with where it comes from, unless it is there."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        rows = [
            {**json.loads(line), "source": name}
            for name in SILOS
            for line in gzip.decompress((data / "medquad" / f"{name}.train.jsonl.gz").read_bytes()).splitlines()
        ]
        lines = [json.dumps(row) for row in rows if len(row["prompt"]) <= QUESTION]
        part = file.with_suffix(".part")
        part.write_bytes(gzip.compress("\n".join(lines).encode(), mtime=0))
        part.replace(file)
    return file.absolute()


def recipe(data: Path, rows: Path, own: Mapping[str, Any]) -> dict[str, Any]:
    """Return the recipe of one run."""
    return {
        "model": str(data / "models" / "stories260k"),
        "device": "cpu",
        "dtype": "float32",
        "threads": torch.get_num_threads(),
        "runtime": "cohort",
        "rounds": ROUNDS,
        "partition": {"name": "dirichlet", "source": str(rows), "silos": USERS, "alpha": 1.0, "column": "source"},
        "data": {"held_out": 0.1},
        "task": {"name": "instruct", "max_tokens": TOKENS},
        "trainable": {"name": "lora", "r": 4, "alpha": 8},
        "select": {"name": "poisson", "rate": RATE},
        "aggregate": {"name": "mean", "weights": "uniform"},
        "evaluate": {"every": ROUNDS, "silos": LOOKED, "alone": False},
        **own,
    }


def noise_of(folder: Path) -> float:
    """Return the noise multiplier that a run's recipe came to."""
    return round(float(read_recipe(folder / "recipe.toml").transforms[0]["noise"]), 4)
