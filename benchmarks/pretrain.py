"""DiLoCo against data-parallel training at equal tokens and equal batches, on silos that do not read alike.

A Llama of about 1 M parameters learns the State of the Union addresses from nothing, 20 tokens a parameter, with a
tokenizer that eight eras learned together. With M silos each has 8 / M neighbouring eras and 1 / M of every batch; the
held-out text is the same for all, the mean over the eight eras. Data-parallel training is one silo that has all text
and takes the server's step with rate 1 and no momentum, which is plain training (a law in tests/laws).

Goals at this size: M = 8 within 8 % of data-parallel training's loss and M = 2 within 3 %; half of the messages lost
within 3 % of none; int4 both ways and H = 100 with 400 times fewer bits than data-parallel training's float32
all-reduce at less than 1 % more loss; a tokenizer within 1 % of the pooled one. `loss_ratio_compressed` has Muon inside
on both sides; with AdamW it is `over_data_parallel.int4_h100`.

    python -m benchmarks.pretrain [--only NAME] [--steps N] [--out FOLDER]

What continued pre-training keeps of its gain (`gain_kept`) is another run, read from continued.json where it is there.

Each run takes about half an hour of one quiet core, those with Muon, in float32, an hour. A run that is killed goes on
from its last round, and one that is done is read from its file in benchmarks/results/pretrain; what is not done is null
in the last line.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, keep
from benchmarks.pretrain_plot import plot
from benchmarks.pretrain_runs import Kind, Setting, begin, finished, packed

PICTURE = Path(__file__).resolve().parents[1] / "docs" / "pretrain.svg"

DATA_PARALLEL = {"optimiser": {"name": "fedavg"}}

DILOCO = {"optimiser": {"name": "nesterov", "learning_rate": 0.9791666666666666, "momentum": 0.0625}}
"""Nearly plain averaging, which was the product's own choice for 320 rounds when these runs were made."""

OUTSIDE_H100 = {"name": "nesterov", "learning_rate": 1.0, "momentum": 0.6, "warmup": 0.1}
"""Found by `benchmarks/pretrain_sweep.py` for two silos and as many rounds; with a lower rate inside."""

MUON = {"optimiser": "muon", "floor": 0.02}
"""Inside, as in MuLoCo; the rates are near those that `benchmarks/pretrain_sweep.py` found best for each of the two."""

FLOAT32 = {"dtype": "float32"}

KINDS = {
    "data_parallel": Kind(1, recipe=DATA_PARALLEL),
    "m1": Kind(1, recipe=DILOCO),
    "m2": Kind(2, recipe=DILOCO),
    "m4": Kind(4, recipe=DILOCO),
    "m8": Kind(8, recipe=DILOCO),
    "drop_half": Kind(8, recipe=DILOCO | {"availability": {"drop": 0.5}}),
    "int4_h100": Kind(2, inner=100, client={"learning_rate": 2.8e-3}, recipe={"optimiser": OUTSIDE_H100} | packed(4)),
    "data_parallel_muon": Kind(1, client=MUON | {"learning_rate": 3e-3}, recipe=DATA_PARALLEL | FLOAT32),
    "int4_h100_muon": Kind(
        2,
        inner=100,
        client=MUON | {"learning_rate": 2.2e-3},
        recipe={"optimiser": OUTSIDE_H100 | {"warmup": 0.05}} | packed(4) | FLOAT32,
    ),
}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--only", choices=[*KINDS, "none"], help="do this run and read the others from their files")
    asked.add_argument("--steps", type=int, default=Setting().steps, help="optimiser steps of a run, for a trial")
    asked.add_argument("--out", type=Path, help="keep runs and results of a trial in this folder")
    given = asked.parse_args()
    setting = Setting(steps=given.steps)
    runs = given.out or Path("runs") / "benchmark-pretrain"
    kept = (given.out or RESULTS) / "pretrain"
    found = {}
    for name, kind in KINDS.items():
        path = kept / f"{name}.json"
        if given.only in (None, name):
            found[name] = finished(name, kind, setting, runs, kept, say)
        elif path.exists():
            found[name] = json.loads(path.read_text())
    continued = kept / "continued.json"
    gain = json.loads(continued.read_text())["gain_kept"] if continued.exists() else None
    result = {**table(found, begin(setting, runs)), "gain_kept": gain}
    if given.out:
        print(json.dumps(result))
    else:
        if found:
            PICTURE.write_text(plot(found))
        keep("pretrain", result)


def say(line: str) -> None:
    print(line, flush=True)


def table(found: Mapping[str, Mapping[str, Any]], start: Mapping[str, Any]) -> dict[str, Any]:
    """Return the benchmark's numbers from its runs; what is not run yet is null."""
    losses = {name: found[name]["loss"] if name in found else None for name in KINDS}
    base, packed, like = losses["data_parallel"], found.get("int4_h100_muon"), losses["data_parallel_muon"]
    result: dict[str, Any] = {f"loss_{name}": loss for name, loss in losses.items()}
    result["bits_ratio"] = bits_ratio(packed, start["parameters"]) if packed else None
    result["loss_ratio_compressed"] = packed["loss"] / like if packed and like else None
    result["tokenizer_ratio"] = start["tokens_per_byte"] / start["pooled_tokens_per_byte"]
    result["over_data_parallel"] = {name: loss / base for name, loss in losses.items() if loss and base}
    if losses["drop_half"] and losses["m8"]:
        result["drop_half_over_m8"] = losses["drop_half"] / losses["m8"]
    result["seconds"] = {name: round(each["seconds"]) for name, each in found.items()}
    return result


def bits_ratio(packed: Mapping[str, Any], parameters: int) -> float:
    """Return how many times fewer bytes a run had on its wire than data-parallel training, both counted both ways.

    A ring all-reduce of float32 gradients over N workers sends 2 (N - 1) / N times the model from each of them in every
    step, and as much comes in.
    """
    silos = packed["settings"]["silos"]
    steps = packed["settings"]["steps"]
    each_way = steps * 2 * (silos - 1) / silos * 4 * parameters * silos
    return 2 * each_way / float(packed["bytes_up"] + packed["bytes_down"])


if __name__ == "__main__":
    main()
