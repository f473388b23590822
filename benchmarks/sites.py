"""A federation on this machine: its folders and keys, its processes, and the quickstart over four sites."""

from __future__ import annotations

import json
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedllm.app.site_template import TEMPLATE

ROOT = Path(__file__).parents[1]
TEAMS = ["torch", "transformers", "numpy", "networkx"]
FEDLLM = [sys.executable, "-m", "fedllm"]
RECIPE = ROOT / "fedllm" / "app" / "quickstart.toml"


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


@contextmanager
def connected(place: Path) -> Iterator[Path]:
    """Keep a server and the quickstart's four sites running, and yield the federation's folder once all are there."""
    from fedllm.federation.server.commands import answer

    folder = join_all(place, TEAMS)
    sites = [
        [*FEDLLM, "site", "start", str(place / name / "site.toml"), "--data", f"docstrings:{name}"] for name in TEAMS
    ]
    with running([[*FEDLLM, "federation", "start", str(folder)], *sites], place):
        until = time.monotonic() + 180
        while sum(site["connected"] for site in answer(folder, "x", {"do": "status"})["sites"].values()) < len(TEAMS):
            assert time.monotonic() < until, "the sites do not connect"
            time.sleep(0.5)
        yield folder


def federated(folder: Path, settings: Sequence[str]) -> None:
    """Run the quickstart's recipe over the sites that are connected, and bring its result beside the federation."""
    run = [*FEDLLM, "federation", "run", str(RECIPE), "--admin", str(folder / "admin"), *said(settings)]
    subprocess.run(run, cwd=folder.parent, check=True)


def said(settings: Sequence[str]) -> list[str]:
    return [part for setting in settings for part in ("--set", setting)]
