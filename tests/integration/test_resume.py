"""Killed at ten random points and resumed after each, a run ends with the bits of the run that was not.

Every process is forked from one that has imported everything already, so that a kill costs no
start-up time. Half of the kills come at a random time, half at a random access to the run's files,
which are the moments that matter most and too short to be met by chance.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock
from safetensors import deserialize

from tests.tiny import write_model, write_rows

KILLS = 10
HEAVY = ["fedllm.app.run", "fedllm.app.report.page", "transformers.models.llama.modeling_llama", "datasets", "peft"]


@pytest.fixture
def place(tmp_path):
    write_model(tmp_path / "model", chat=True)
    for name in "abc":
        rows = [{"prompt": f"{name} {i}?", "response": f"the cat sat {i}"} for i in range(30)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    return tmp_path


def recipe(place: Path) -> dict[str, Any]:
    return {
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "rounds": 4,
        "silos": {name: f"{name}.jsonl" for name in "abc"},
        "data": {"root": str(place)},
        "trainable": {"name": "lora", "dropout": 0.1},
        "client": {"steps": 6, "batch_size": 4},
        "select": {"name": "fixed_size", "size": 2},
        "optimiser": {"name": "fedadam", "learning_rate": 1e-3},
        # What was not sent stays at the silo: its memory must come back with the checkpoint.
        "transforms": [{"name": "top_k", "fraction": 0.2}],
    }


def go_on(place: Path, folder: Path, deadly: int | None = None) -> None:
    """Run, or resume what is there; killed at the `deadly`-th access to the run's files, or say how many there were."""
    from fedllm.app.run import resume, run

    count = 0

    def watch(event: str, values: tuple[Any, ...]) -> None:
        nonlocal count
        if event in ("open", "os.rename", "os.remove", "os.mkdir") and folder.name in str(values[0]):
            if count == deadly:
                os.kill(os.getpid(), signal.SIGKILL)
            count += 1

    sys.addaudithook(watch)
    if (folder / "recipe.toml").exists():
        resume(folder)
    else:
        run(recipe(place), folder)
    counted = count
    (place / "accesses").write_text(str(counted))


def result(folder: Path) -> dict[str, Any]:
    """Return all that must be equal: the adapter's bytes, the losses, the rounds without their seconds."""
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "metrics": {
            key: value
            for key, value in json.loads((folder / "metrics.json").read_text()).items()
            if "seconds" not in key and key != "peak_mb"
        },
        "rounds": [{k: v for k, v in event.items() if k != "seconds"} for event in events if event["event"] == "round"],
        "kinds": [event["event"] for event in events],
        "checkpoint": dict(deserialize((folder / "checkpoints" / "round-000004.safetensors").read_bytes())),
    }


def test_ten_kills_change_no_bit(place):
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)

    def process(folder: Path, deadly: int | None = None) -> Any:
        made = context.Process(target=go_on, args=(place, folder, deadly))
        made.start()
        return made

    straight = process(place / "straight")
    straight.join(120)
    assert straight.exitcode == 0
    begun = time.monotonic()
    again = process(place / "again")
    again.join(120)
    seconds = time.monotonic() - begun
    accesses = int((place / "accesses").read_text())
    expected = result(place / "straight")
    assert result(place / "again") == expected
    assert expected["kinds"] == ["start", "base", *["round"] * 4, *["alone"] * 3, "done"]

    rng, killed, number = random.Random(7), 0, 0
    folder = place / "killed-0"
    while killed < KILLS:
        if killed % 2:
            last = process(folder, deadly=rng.randrange(accesses // 2))
            last.join(120)
        else:
            last = process(folder)
            last.join(rng.uniform(0.0, 0.8) * seconds)
            last.kill()
            last.join(120)
        if last.exitcode == -signal.SIGKILL:
            killed += 1
        else:
            # It was quicker than the kill: it must be right, and the next kills meet another one.
            assert last.exitcode == 0
            assert result(folder) == expected
            number += 1
            folder = place / f"killed-{number}"
    last = process(folder)
    last.join(120)
    assert last.exitcode == 0
    assert result(folder) == expected


def test_the_lock_of_a_killed_process_goes_with_it(place):
    context = multiprocessing.get_context("forkserver")
    holder = context.Process(target=hold, args=(place,))
    holder.start()
    end = time.monotonic() + 60
    while not (place / "held").exists():
        assert time.monotonic() < end
        time.sleep(0.02)
    holder.kill()
    holder.join(60)
    with FileLock(place / "lock", timeout=5):
        pass


def hold(place: Path) -> None:
    """Hold a lock until killed."""
    with FileLock(place / "lock", timeout=0):
        (place / "held").write_text("")
        time.sleep(600)
