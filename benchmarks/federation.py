"""NVIDIA FLARE as the engine: empty rounds, large payloads, memory, start-up; and the quickstart over four sites.

`python -m benchmarks.federation` measures the engine with four sites that send back what they get, called directly and
by FLARE alone, and then runs the quickstart's recipe (half its rounds unless `--whole`) in one process and over four
site processes on this machine, one thread each, and compares bits and seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from benchmarks.common import keep, kept
from benchmarks.sites import FEDLLM, RECIPE, ROOT, connected, federated, join_all, running, said

ECHO = ["a", "b", "c", "d"]


def engine(place: Path, alone: bool = False) -> dict[str, float]:
    """Measure what carries the work; `alone`: FLARE without a direct connection."""
    from fedllm.app.config import read_recipe, write_recipe
    from fedllm.app.lead import question
    from fedllm.federation.server.commands import answer
    from fedllm.silo.models import weights_sha256

    folder = join_all(place, ECHO)
    recipe = read_recipe({"model": "smollm2-135m-instruct", "rounds": 1})
    serving = [sys.executable, "-m", "benchmarks.echo", "alone" if alone else "serve", str(folder)]
    begun = time.time()
    sites = [[sys.executable, "-m", "benchmarks.echo", "start", name, str(place / name)] for name in ECHO]
    with running([serving, *sites], place):
        asked = answer(folder, "admin@example.org", {"do": "submit", "name": "echo", "recipe": write_recipe(recipe)})
        assert "error" not in asked, asked
        run = folder / "runs" / "echo"
        # All sites are asked alike.
        asking = question(ECHO[0], recipe, weights_sha256(recipe.model), "echo", "admin@example.org")
        (run / "question.json").write_text(json.dumps(asking))
        told = wait_for(run / "told.json", run, 540)
    rounds = {size: statistics.median(told[str(size)]["seconds"]) for size in (100, 500)}
    payload = 500 * 10**6 / 2**20
    return {
        "empty_round_s": round(statistics.median(told["empty"]), 3),
        "mb_per_s_100": round(8 * 100 / rounds[100]),
        "mb_per_s_500": round(8 * 500 / rounds[500]),
        "server_rss_over_payload": round(told["500"]["peak_mb"] / payload, 2),
        "server_peak_mb_500": round(told["500"]["peak_mb"]),
        "server_idle_mb": round(told["idle_mb"]),
        "startup_s": round(told["begun"] - begun, 1),
    }


def wait_for(path: Path, run: Path, seconds: float) -> dict[str, Any]:
    until = time.monotonic() + seconds
    while not path.exists():
        if time.monotonic() > until:
            raise SystemExit(f"no result; {[f.name for f in run.iterdir()]}")
        time.sleep(0.2)
    time.sleep(0.2)
    return dict(json.loads(path.read_text()))


def quickstart(place: Path, settings: Sequence[str]) -> dict[str, float]:
    """Run the quickstart's recipe in one process and over four sites."""
    from safetensors.torch import load_file

    run = [*FEDLLM, "run", str(RECIPE), "--out", str(place / "local"), *said(settings)]
    subprocess.run(run, cwd=place, check=True)
    with connected(place) as folder:
        federated(folder, settings)
    far, here = place / "runs" / "quickstart", place / "local"
    mine, theirs = (load_file(each / "adapter" / "adapter_model.safetensors") for each in (here, far))
    return {
        "same_bits": mine.keys() == theirs.keys() and all(mine[name].equal(theirs[name]) for name in mine),
        "local_rounds_s": round(seconds_of_rounds(here), 1),
        "federated_rounds_s": round(seconds_of_rounds(far), 1),
        "engine_share": round(seconds_of_rounds(far) / seconds_of_rounds(here) - 1, 3),
    }


def seconds_of_rounds(folder: Path) -> float:
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    return float(sum(sum(event["seconds"].values()) for event in events if event["event"] == "round"))


def main(
    whole: Annotated[bool, typer.Option(help="All rounds of the quickstart.")] = False,
    only: Annotated[
        Literal["all", "engine", "alone"], typer.Option(help="Measure a part anew; of the others stays what is kept.")
    ] = "all",
) -> None:
    """Measure all of it, or a part, and keep what was found."""
    settings = ["threads=1", "runtime=local", "evaluate.alone=false", *([] if whole else ["rounds=2"])]
    os.environ["PYTHONPATH"] = str(ROOT)
    place = Path(tempfile.mkdtemp(prefix="fedllm-bench-"))
    try:
        for part in ("engine", "alone", "quickstart"):
            (place / part).mkdir()
        found = engine(place / "engine") if only != "alone" else {}
        if only != "engine":
            found |= {f"flare_alone_{key}": value for key, value in engine(place / "alone", alone=True).items()}
        if only == "all":
            print(json.dumps(found), flush=True)
            found |= quickstart(place / "quickstart", settings)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for key, value in found.items():
        print(f"{key:<34} {value}")
    keep("federation", {**kept("federation"), **found})


if __name__ == "__main__":
    typer.run(main)
