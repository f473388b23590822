"""The outer step's settings tried on a small model, at the same tokens a parameter as the benchmark itself.

    python -m benchmarks.pretrain_sweep [--out FOLDER] [name=value ...]

`silos`, `rows`, `steps` and `seed` of the run, the `optimiser` inside with its `rate`, the `floor` that it falls to,
`beta2` and `inner` steps a round, `outer` rate with its `warmup` and `momentum` outside, `bits` of what is sent both
ways (0: float32), and the `dtype`, of which bfloat16 takes many times as long on a processor that does not know it;
without any, the settings in `TRIED`, of which those that are in the file are not run again. Each takes two to five
minutes of one quiet core.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any, NamedTuple

import fedllm
from benchmarks.common import RESULTS, machine
from benchmarks.pretrain_runs import Kind, Setting, begin, outcome, packed, recipe_of
from fedllm.runtime.store import write_text

KEPT = RESULTS / "pretrain" / "sweep.json"


class Trial(NamedTuple):
    """One setting; 166,208 parameters and 3.3 M tokens where nothing else is said."""

    silos: int = 8
    rate: float = 4e-3
    outer: float = 1.0
    momentum: float = 0.0
    rows: int = 32
    steps: int = 810
    hidden: int = 64
    layers: int = 2
    inner: int = 30
    bits: int = 0
    warmup: float = 0.0
    floor: float = 0.1
    dtype: str = "bfloat16"
    optimiser: str = "adamw"
    beta2: float = 0.99
    seed: int = 0


TRIED = [
    Trial(silos=1),
    Trial(silos=1, rate=8e-3),
    Trial(silos=1, outer=0.7, momentum=0.9),
    *(Trial(rate=rate) for rate in (2e-3, 4e-3, 8e-3)),
    Trial(outer=1.5),
    Trial(outer=0.55, momentum=0.8),
    Trial(outer=1.0, momentum=0.5),
    *(Trial(rate=rate, outer=0.7, momentum=0.9) for rate in (4e-3, 8e-3)),
    Trial(silos=1, rows=16, steps=1620),
    Trial(rate=8e-3, rows=16, steps=1620),
    Trial(silos=1, rate=0.6e-3, outer=0.7, momentum=0.9, rows=16, steps=1620),
]
"""What the defaults of `core/optimisers.py` rest on."""


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("settings", nargs="*", help="one trial, as name=value")
    asked.add_argument("--out", type=Path, default=Path("runs") / "benchmark-pretrain-sweep")
    given = asked.parse_args()
    told = json.loads(KEPT.read_text()) if KEPT.exists() else {"trials": []}
    for trial in [one(given.settings)] if given.settings else TRIED:
        if trial in [Trial(**{key: each[key] for key in Trial._fields if key in each}) for each in told["trials"]]:
            continue
        told["trials"].append({**trial._asdict(), **tried(trial, given.out), "machine": machine()})
        KEPT.parent.mkdir(parents=True, exist_ok=True)
        write_text(KEPT, json.dumps(told, indent=1) + "\n")
        print(json.dumps(told["trials"][-1]), flush=True)
    print(json.dumps(told))


def one(settings: list[str]) -> Trial:
    """Return the trial that is asked for."""
    words = dict(each.split("=") for each in settings)
    return Trial(**{key: type(Trial._field_defaults[key])(value) for key, value in words.items()})


def tried(trial: Trial, out: Path) -> dict[str, Any]:
    """Run a trial, or go on with it, and return its held-out loss."""
    setting = Setting(steps=trial.steps, rows=trial.rows, hidden=trial.hidden, layers=trial.layers)
    folder = out / f"{trial.hidden}x{trial.layers}"
    outside = {"name": "nesterov", "learning_rate": trial.outer, "momentum": trial.momentum, "warmup": trial.warmup}
    tables = {"dtype": trial.dtype, "optimiser": outside} | (packed(trial.bits) if trial.bits else {})
    inside = {"optimiser": trial.optimiser, "learning_rate": trial.rate, "floor": trial.floor}
    inside["betas"] = (0.9, trial.beta2)
    kind = Kind(trial.silos, inner=trial.inner, client=inside, recipe=tables)
    begin(setting, folder)
    run = folder / "-".join(map(str, trial))
    recipe = recipe_of(kind, setting._replace(seed=trial.seed), str(folder / "start"), folder / "data")
    fedllm.resume(run) if (run / "recipe.toml").exists() else fedllm.run(recipe, run)
    found = outcome(run, setting, folder, kind)
    return {key: found[key] for key in ("loss", "rounds", "tokens", "seconds")}


if __name__ == "__main__":
    main()
