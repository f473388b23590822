"""NVIDIA FLARE as the engine: empty rounds, large payloads, memory, start-up; and the quickstart over four sites.

`python -m benchmarks.federation` measures the engine with four sites that send back what they get, and
then runs the quickstart's recipe (half its rounds unless `--whole`) in one process and over four site
processes on this machine, one thread each, and compares bits and seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

from benchmarks.common import keep
from fedllm.app.site_template import TEMPLATE

ROOT = Path(__file__).parents[1]
ECHO = ["a", "b", "c", "d"]
TEAMS = ["torch", "transformers", "numpy", "networkx"]
FEDLLM = [sys.executable, "-m", "fedllm"]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def join_all(place: Path, sites: Sequence[str]) -> Path:
    """Make a federation and its sites' folders; return the federation's folder."""
    from fedllm.federation.members import approve, init, join, request

    (place / "consortium.toml").write_text(
        f'name = "bench"\nserver = {{ address = "localhost", port = {free_port()} }}\n'
        f'admin = "admin@example.org"\nsites = {json.dumps(sites)}\n'
    )
    init(place / "consortium.toml", place / "federation")
    for name in sites:
        (place / name).mkdir()
        (place / name / "site.toml").write_text(TEMPLATE.format(name=name).replace("# threads = 2 ", "threads = 1 "))
        join(approve(place / "federation", request(name, place / name)), place / name)
    return place / "federation"


@contextmanager
def running(commands: Sequence[Sequence[str]], place: Path) -> Iterator[None]:
    """Keep commands running."""
    with ExitStack() as stack, (place / "terminal.log").open("ab") as log:
        for command in commands:
            process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log)
            stack.callback(end, process)
        yield


def end(process: subprocess.Popen[bytes]) -> None:
    process.terminate()
    try:
        process.wait(30)
    except subprocess.TimeoutExpired:
        process.kill()


def engine(place: Path) -> dict[str, float]:
    """Measure the engine alone."""
    from fedllm.app.config import read_recipe, write_recipe
    from fedllm.app.lead import question
    from fedllm.federation.commands import answer
    from fedllm.silo.models import weights_sha256

    folder = join_all(place, ECHO)
    recipe = read_recipe({"model": "smollm2-135m-instruct", "rounds": 1})
    serving = [sys.executable, "-m", "benchmarks.echo", "serve", str(folder)]
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

    from fedllm.federation.commands import answer

    recipe = ROOT / "fedllm" / "app" / "quickstart.toml"
    said = [part for setting in settings for part in ("--set", setting)]
    subprocess.run([*FEDLLM, "run", str(recipe), "--out", str(place / "local"), *said], cwd=place, check=True)
    folder = join_all(place, TEAMS)
    sites = [
        [*FEDLLM, "site", "start", str(place / name / "site.toml"), "--data", f"docstrings:{name}"] for name in TEAMS
    ]
    with running([[*FEDLLM, "federation", "start", str(folder)], *sites], place):
        until = time.monotonic() + 60
        while sum(site["connected"] for site in answer(folder, "x", {"do": "status"})["sites"].values()) < len(TEAMS):
            assert time.monotonic() < until, "the sites do not connect"
            time.sleep(0.5)
        run = [*FEDLLM, "federation", "run", str(recipe), "--admin", str(folder / "admin"), *said]
        subprocess.run(run, cwd=place, check=True)
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


def main() -> None:
    rounds = [] if "--whole" in sys.argv else ["rounds=2"]
    settings = ["threads=1", "runtime=local", "evaluate.alone=false", *rounds]
    os.environ["PYTHONPATH"] = str(ROOT)
    place = Path(tempfile.mkdtemp(prefix="fedllm-bench-"))
    try:
        (place / "engine").mkdir()
        (place / "quickstart").mkdir()
        found = engine(place / "engine")
        print(json.dumps(found), flush=True)
        if "--engine" in sys.argv:
            return
        found |= quickstart(place / "quickstart", settings)
    finally:
        shutil.rmtree(place, ignore_errors=True)
    for key, value in found.items():
        print(f"{key:<26} {value}")
    keep("federation", found)


if __name__ == "__main__":
    main()
