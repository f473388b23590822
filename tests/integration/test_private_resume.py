"""Killed at random points, a run with noise has the bits and the ledger of the run that was not: no look is lost,
none is counted twice.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

from tests.integration.test_resume import HEAVY, place, recipe, result  # noqa: F401

KILLS = 3


def private(place: Path) -> dict[str, Any]:  # noqa: F811
    return {
        **recipe(place),
        "client": {"name": "dp_sgd", "clip": 0.5, "noise": 1.0, "steps": 2, "rate": 1.0},
        "trainable": {"name": "lora", "r": 4},
        "data": {"root": str(place), "limit_train": 6, "limit_test": 2},
        "aggregate": {"name": "mean", "weights": "uniform"},
        "select": {"name": "poisson", "rate": 0.6},
        "transforms": [{"name": "central_dp", "max_norm": 0.5, "noise": 1.0}],
        "evaluate": {"alone": False, "batch_size": 4},
    }


def go_on(place: Path, folder: Path, deadly: int | None = None) -> None:  # noqa: F811
    """Run, or resume what is there; killed at the `deadly`-th access to the run's files, or say how many there were."""
    from fedllm.app.run import resume, run

    count = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.truncate") and folder.name in str(values[0]):
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    if (folder / "recipe.toml").exists():
        resume(folder)
    else:
        run(private(place), folder, secret=b"t" * 32)
    (place / "accesses").write_text(str(count))


def whole(folder: Path) -> dict[str, Any]:
    return {**result(folder), "ledger": (folder / "ledger.jsonl").read_bytes()}


def test_kills_change_no_bit_and_no_line_of_the_ledger(place):  # noqa: F811
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)

    def process(folder: Path, deadly: int | None = None) -> int | None:
        made = context.Process(target=go_on, args=(place, folder, deadly))
        made.start()
        made.join(240)
        return made.exitcode

    assert process(place / "straight") == 0
    expected, accesses = whole(place / "straight"), int((place / "accesses").read_text())
    lines = [json.loads(line) for line in expected["ledger"].splitlines()]
    assert [line["round"] for line in lines if line["unit"] == "silo"] == [1, 2, 3, 4]
    asked = [set(event["asked"]) for event in expected["rounds"]]
    for number, names in enumerate(asked, 1):
        assert {line["silo"] for line in lines if line["unit"] == "record" and line["round"] == number} == names
    rng, folder = random.Random(3), place / "killed"
    for _ in range(KILLS):
        assert process(folder, deadly=rng.randrange(accesses // 3)) in (-signal.SIGKILL, 0)
    assert process(folder) == 0
    assert whole(folder) == expected
