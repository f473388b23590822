"""Made-up run folders for the report's tests: plausible numbers, no training."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

BASE = {"torch": 4.21, "transformers": 3.98, "numpy": 4.05, "networkx": 4.24}
FEDERATED = {"torch": 3.42, "transformers": 3.18, "numpy": 3.09, "networkx": 3.31}
POOLED = {"torch": 3.38, "transformers": 3.17, "numpy": 3.08, "networkx": 3.29}
ALONE = {
    "torch": {"torch": 3.40, "transformers": 3.26, "numpy": 3.19, "networkx": 3.43},
    "transformers": {"torch": 3.52, "transformers": 3.16, "numpy": 3.21, "networkx": 3.43},
    "numpy": {"torch": 3.53, "transformers": 3.30, "numpy": 3.07, "networkx": 3.46},
    "networkx": {"torch": 3.49, "transformers": 3.27, "numpy": 3.18, "networkx": 3.26},
}
RECIPE = """name = "quickstart"
task = "instruct"

[model]
id = "smollm2-135m-instruct"

[rounds]
count = 3
steps = 4
"""


def events(rounds: int = 3, *, finished: bool = True, everything: bool = True) -> list[dict[str, Any]]:
    """Return the events of the quickstart as it might have run."""
    made: list[dict[str, Any]] = [start(), {"event": "base", "loss": BASE, "seconds": 8.1}]
    for number in range(1, rounds + 1):
        left = 0.28 ** (number / 1.6) if number < 3 else 0.0
        loss = {name: FEDERATED[name] + left * (BASE[name] - FEDERATED[name]) for name in BASE}
        made.append(
            {
                "event": "round",
                "round": number,
                "loss": loss,
                "train_loss": {name: value + 0.05 for name, value in loss.items()},
                "seconds": {"train": 20.1 + number, "aggregate": 0.12, "evaluate": 7.0, "store": 0.09},
                "bytes_up": 4 * 3686400,
                "bytes_down": 4 * 3686400,
                "tokens": 12_400,
                "clients": 4,
                "asked": 4,
                "dropped": {},
                "aggregation_error": 0.04 + 0.013 * number,
            }
        )
    if everything:
        made += [{"event": "alone", "silo": name, "loss": row, "seconds": 19.4} for name, row in ALONE.items()]
        made.append({"event": "pooled", "loss": POOLED, "seconds": 62.0})
        made.append({"event": "scores", "name": "choice arc_easy", "base": 0.40, "federated": 0.42, "n": 100})
    return made + ([{"event": "done", "seconds": 268.0}] if finished else [])


def start() -> dict[str, Any]:
    """Return the first event of a run."""
    rows = {"torch": 572, "transformers": 431, "numpy": 398, "networkx": 365}
    return {
        "event": "start",
        "time": "2026-11-20T10:00:00Z",
        "name": "quickstart",
        "model": "smollm2-135m-instruct",
        "model_parameters": 134515008,
        "trained_parameters": 921600,
        "trainable": "lora",
        "task": "instruct",
        "runtime": "local",
        "device": "cpu",
        "dtype": "bfloat16",
        "machine": "2 cores, Linux x86_64",
        "versions": {"fedllm": "0.1.0", "torch": "2.13.0", "transformers": "5.2.0"},
        "rounds": 3,
        "silos": {name: {"train": count - 32, "test": 32} for name, count in rows.items()},
        "holds": {
            "groups": ["classes", "functions", "methods"],
            "counts": {
                "torch": [102, 250, 220],
                "transformers": [160, 81, 190],
                "numpy": [40, 318, 40],
                "networkx": [20, 330, 15],
            },
            "rows": rows,
            "words": {"torch": 9120, "transformers": 8050, "numpy": 5210, "networkx": 4630},
        },
        "plan": {
            "steps": [
                {"where": "server", "name": "select: 4 of 4 silos", "facts": ""},
                {"where": "wire", "name": "share: A and B", "facts": "every silo sees the same adapter"},
                {"where": "silo", "name": "fit: 4 steps of AdamW", "facts": "update, norm unbounded"},
                {"where": "wire", "name": "reply: start - end", "facts": "server sees each update"},
                {"where": "server", "name": "mean, weighted by examples", "facts": "server sees each update"},
                {"where": "server", "name": "server optimiser: fedavg", "facts": ""},
            ],
            "parameters": 921600,
            "bytes_up": 3686400,
            "bytes_down": 3686400,
        },
    }


def metrics() -> dict[str, Any]:
    """Return what a finished run measures."""
    own = {name: row[name] for name, row in ALONE.items()}
    return {
        "loss": {"base": BASE, "alone": own, "federated": FEDERATED, "pooled": POOLED},
        "alone_everywhere": ALONE,
        "rounds": 3,
        "tokens": 37_200,
        "seconds": 268.0,
        "bytes_up": 12 * 3686400,
        "bytes_down": 12 * 3686400,
        "aggregation_error": 0.079,
    }


def write(folder: Path, lines: list[dict[str, Any]] | None = None, measured: dict[str, Any] | None = None) -> Path:
    """Write a run folder; with no arguments that of the finished quickstart."""
    measured = metrics() if lines is None else measured
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "recipe.toml").write_text(RECIPE)
    text = "".join(json.dumps(line) + "\n" for line in (events() if lines is None else lines))
    (folder / "events.jsonl").write_text(text)
    if measured is not None:
        (folder / "metrics.json").write_text(json.dumps(measured))
    return folder


def renamed(value: Any, names: dict[str, str]) -> Any:
    """Return the value with every key and every silo named anew."""
    if isinstance(value, dict):
        return {names.get(key, key): renamed(inner, names) for key, inner in value.items()}
    if isinstance(value, list):
        return [renamed(inner, names) for inner in value]
    return names.get(value, value) if isinstance(value, str) else value


def crowd(count: int = 1000) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Return the events and metrics of a run with very many silos."""
    draw = random.Random(0)
    names = [f"practice_{place:04}" for place in range(count)]
    base = {name: draw.gauss(4.1, 0.2) for name in names}
    end = {name: value - abs(draw.gauss(0.8, 0.15)) for name, value in base.items()}
    own = {name: value + draw.gauss(0.1, 0.12) for name, value in end.items()}
    first = start()
    rows = {name: round(draw.lognormvariate(5, 0.8)) for name in names}
    first["silos"] = {name: {"train": count, "test": 8} for name, count in rows.items()}
    first["holds"] = {"groups": ["a", "b"], "counts": {n: [c, 3] for n, c in rows.items()}, "rows": rows}
    lines = [first, {"event": "base", "loss": base, "seconds": 8.1}]
    for number in (1, 2, 3):
        loss = {name: end[name] + (base[name] - end[name]) * 0.3**number for name in names}
        lines.append({"event": "round", "round": number, "loss": loss, "seconds": {"train": 20.0}})
        lines[-1]["dropped"] = {names[place]: "update is not finite" for place in range(number * 20)}
    lines.append({"event": "done", "seconds": 90.0})
    return lines, {"loss": {"base": base, "alone": own, "federated": end}, "rounds": 3}
