"""One run of the pre-training benchmark through the product: its text, its start, its recipe, and what came of it."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from filelock import FileLock

import fedllm
from benchmarks.common import machine
from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.progress import Ui
from fedllm.app.run import resume
from fedllm.app.scratch import start
from fedllm.app.stages import held_out_losses, looking
from fedllm.runtime.store import read_events, write_text
from fedllm.silo.sources import Row, hold_out
from fedllm.silo.speeches import speech_rows

ERAS = 8


class Setting(NamedTuple):
    """What all runs have in common."""

    steps: int = 9600
    """Optimiser steps from start to end; divisible by 30 and by 100."""
    rows: int = 16
    """Rows of one step, over all silos."""
    block: int = 128
    hidden: int = 128
    layers: int = 4
    vocab: int = 1024
    seed: int = 0
    held_out: int = 24_000
    """Characters of each era's held-out text."""
    addresses: int = 0
    """Addresses that a silo learns from at most, for a trial; 0: all."""

    @property
    def tokens(self) -> int:
        """Tokens that a run reads."""
        return self.steps * self.rows * self.block


class Kind(NamedTuple):
    """What one run has of its own."""

    silos: int
    inner: int = 30
    """H, steps of a round."""
    client: Mapping[str, Any] = {}
    recipe: Mapping[str, Any] = {}
    """Tables of the recipe."""


def packed(bits: int) -> dict[str, Any]:
    """Return a recipe's tables that send whole numbers of so few bits both ways, with what rounding took away later."""
    return {"share": {"name": "deltas", "bits": bits}, "transforms": [{"name": "quantise", "bits": bits}]}


def texts_of_eras(held_out: int) -> dict[str, tuple[list[Row], list[Row]]]:
    """Return each era's text to learn from and held-out text, the latter as much in each."""
    eras: dict[str, list[Row]] = {}
    for row in speech_rows(ERAS):
        eras.setdefault(str(row["era"]).replace("-", "_"), []).append({"text": row["text"]})
    found = {}
    for name, rows in eras.items():
        train, test = hold_out(rows, 0.1)
        cut = held_out // len(test)
        found[name] = (train, [{"text": str(row["text"])[:cut]} for row in test])
    return found


def silos_of(count: int, setting: Setting, folder: Path) -> dict[str, dict[str, str]]:
    """Return the files of `count` silos, each with the text of neighbouring eras, and write them once."""
    told = folder / f"{count}.json"
    folder.mkdir(parents=True, exist_ok=True)
    # Another run may be about to write the same.
    with FileLock(folder / "lock"):
        if not told.exists():
            write_text(told, json.dumps(written(count, setting, folder)))
    found: dict[str, dict[str, str]] = json.loads(told.read_text())
    return found


def written(count: int, setting: Setting, folder: Path) -> dict[str, dict[str, str]]:
    """Write the text of so many silos and return their files."""
    eras, each, silos = texts_of_eras(setting.held_out), ERAS // count, dict[str, dict[str, str]]()
    for first in range(0, ERAS, each):
        group = list(eras)[first : first + each]
        name = f"{group[0].partition('_')[0]}_{group[-1].rpartition('_')[2]}"
        silos[name] = {}
        for place, kind in enumerate(("train", "test")):
            path = (folder / f"{name}.{kind}.jsonl").absolute()
            write_text(path, "".join(json.dumps(row) + "\n" for era in group for row in eras[era][place]))
            silos[name][kind] = str(path)
    return silos


def recipe_of(kind: Kind, setting: Setting, model: str, data: Path) -> dict[str, Any]:
    """Return the recipe of a run."""
    rows = max(1, setting.rows // kind.silos)
    client = {
        "steps": kind.inner,
        "learning_rate": 4e-3,
        "batch_size": rows,
        "micro_batch": min(rows, 8),
        "betas": (0.9, 0.99),
        "weight_decay": 0.1,
        "keep_optimiser": True,
        "schedule": "cosine",
        "warmup": 0.05,
        "floor": 0.1,
        "weight": "tokens",
    }
    return {
        "seed": setting.seed,
        "rounds": setting.steps // kind.inner,
        "model": model,
        "threads": 1,
        "device": "cpu",
        "dtype": "bfloat16",
        "silos": silos_of(kind.silos, setting, data),
        "data": {"limit_train": setting.addresses, "limit_test": 0},
        "task": {"name": "causal", "block": setting.block},
        "trainable": {"name": "full"},
        "client": {**client, **kind.client},
        "evaluate": {"every": max(1, setting.steps // kind.inner // 40), "batch_size": 8, "alone": False},
        **kind.recipe,
    }


def begin(setting: Setting, folder: Path) -> dict[str, Any]:
    """Learn the tokenizer over the eras and make the model that all runs start from, once."""
    told, config = folder / "start.json", folder / "config.json"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / "start.lock"):
        if not told.exists():
            write_text(config, json.dumps(shape(setting)))
            recipe = recipe_of(Kind(ERAS), setting, "", folder / "data")
            recipe["scratch"] = {"config": str(config), "vocab": setting.vocab, "context": setting.block}
            recipe["evaluate"] = {"pooled": True}
            write_text(told, json.dumps(start(read_recipe(recipe), folder / "start", Ui(None)), indent=1) + "\n")
    found: dict[str, Any] = json.loads(told.read_text())
    return found


def shape(setting: Setting) -> dict[str, Any]:
    """Return the configuration of a small Llama."""
    return {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "hidden_size": setting.hidden,
        "intermediate_size": setting.hidden * 11 // 4,
        "num_hidden_layers": setting.layers,
        "num_attention_heads": max(1, setting.hidden // 64),
        "num_key_value_heads": max(1, setting.hidden // 64),
        "max_position_embeddings": setting.block,
        "tie_word_embeddings": True,
    }


def finished(
    name: str, kind: Kind, setting: Setting, folder: Path, kept: Path, say: Callable[[str], None]
) -> dict[str, Any]:
    """Return what came of a run: from its file if it is done, else of the run begun or gone on with."""
    path = kept / f"{name}.json"
    if path.exists():
        found: dict[str, Any] = json.loads(path.read_text())
        return found
    begin(setting, folder)
    run, recipe = folder / name, recipe_of(kind, setting, str(folder / "start"), folder / "data")
    say(f"{name}: {recipe['rounds']} rounds of {kind.inner} steps, {kind.silos} silos, {setting.tokens:,} tokens")
    resume(run) if (run / "recipe.toml").exists() else fedllm.run(recipe, run)
    result = {
        "run": name,
        "command": f"python -m benchmarks.pretrain --only {name}",
        "machine": machine(),
        **outcome(run, setting, folder, kind),
    }
    kept.mkdir(parents=True, exist_ok=True)
    write_text(path, json.dumps(result, indent=1) + "\n")
    say(f"{name}: held-out loss {result['loss']:.4f}")
    return result


def outcome(run: Path, setting: Setting, folder: Path, kind: Kind) -> dict[str, Any]:
    """Return a run's loss on the eras' held-out text, its curve, bytes and seconds."""
    events = read_events(run)
    rounds = [event for event in events if event["event"] == "round"]
    per_round = setting.rows * setting.block * kind.inner
    curve = [[event["round"] * per_round, mean(event["loss"].values())] for event in rounds if event.get("loss")]
    losses = era_losses(run / "model", setting, folder)
    settings = {key: value for key, value in read_recipe(run / "recipe.toml").model_dump().items() if key in SHOWN}
    return {
        "loss": mean(losses.values()),
        "eras": losses,
        "curve": curve,
        "tokens": sum(event["tokens"] for event in rounds),
        "rounds": len(rounds),
        "bytes_up": sum(event["bytes_up"] for event in rounds),
        "bytes_down": sum(event["bytes_down"] for event in rounds),
        "dropped": sum(len(event["dropped"]) for event in rounds),
        "seconds": sum(event["seconds"]["train"] for event in rounds),
        "settings": {**setting._asdict(), "silos": kind.silos, **settings},
    }


SHOWN = ("rounds", "dtype", "client", "optimiser", "share", "transforms", "availability", "select")
"""Tables of a recipe that make the runs different."""


def era_losses(model: Path, setting: Setting, folder: Path) -> dict[str, float]:
    """Return a model's loss on each era's held-out text, in float32."""
    recipe = recipe_of(Kind(ERAS), setting, str(model), folder / "data")
    parts = build(read_recipe({**recipe, "dtype": "float32"}))
    return held_out_losses(parts, looking(parts, {}, Ui(None)), parts.params)["loss"]


def mean(values: Any) -> float:
    """Return the mean of some numbers."""
    found: Sequence[float] = list(values)
    return sum(found) / len(found)
