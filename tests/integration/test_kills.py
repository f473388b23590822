"""Kill -9 of anything at any instant: every run ends, with the bits of the undisturbed one or the drop-out counted."""

from __future__ import annotations

import json
import os
import random
import subprocess
import threading
import time
from pathlib import Path

import psutil
import pytest
import torch

from benchmarks.sites import FEDLLM, join_all
from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.run import run as run_here
from fedllm.federation.server.commands import answer
from fedllm.runtime.store import read_events
from tests.integration.test_two_machines import SITES, adapter, prepare

KILLS = int(os.environ.get("FEDLLM_KILLS", "100"))
SEED = int(os.environ.get("FEDLLM_SEED", "0"))
KILLS_A_RUN = 3
SHARES = [[], ["share.name=fragments", "share.count=2", "share.delay=1"]]
"""How the runs share, in turn: all at once, and parts that come late, so that rounds are begun before their turn."""
LIMIT = float(os.environ.get("FEDLLM_LIMIT", "240"))
"""Seconds within which a run must end, from its last kill on; a busy machine needs more."""

pytestmark = pytest.mark.slow
pytest.importorskip("nvflare", reason="the extra fedllm[federation] is not installed")


class Kept:
    """Daemons that something like systemd starts again whenever they die."""

    def __init__(self, commands: dict[str, list[str]], log: Path) -> None:
        self.commands, self.log, self.over = commands, log.open("ab"), threading.Event()
        self.running = {name: self.started(name) for name in commands}
        self.keeper = threading.Thread(target=self.keep, daemon=True)
        self.keeper.start()

    def started(self, name: str) -> subprocess.Popen[bytes]:
        return subprocess.Popen(self.commands[name], stdout=self.log, stderr=self.log)

    def keep(self) -> None:
        while not self.over.wait(0.5):
            for name, process in self.running.items():
                if process.poll() is not None:
                    self.running[name] = self.started(name)

    def processes(self) -> list[tuple[str, psutil.Process]]:
        """Every process of every daemon, with a word for what it is."""
        found = []
        for name, daemon in list(self.running.items()):
            for process in whole(daemon.pid):
                try:
                    line = " ".join(process.cmdline())
                except psutil.Error:
                    continue
                kinds = {
                    "app.worker": "worker",
                    "client_train": "client parent",
                    "server_train": "server parent",
                    "runner_process": "job process",
                    "worker_process": "job process",
                    "site start": "site daemon",
                    "federation start": "server daemon",
                }
                kind = next((kind for word, kind in kinds.items() if word in line), None)
                if kind and process.is_running():
                    found.append((f"{kind} of {name}", process))
        return found

    def close(self) -> None:
        self.over.set()
        self.keeper.join()
        for process in self.running.values():
            process.terminate()
        for process in self.running.values():
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()


def whole(pid: int) -> list[psutil.Process]:
    try:
        parent = psutil.Process(pid)
        return [parent, *parent.children(recursive=True)]
    except psutil.Error:
        return []


def test_a_hundred_kills(tmp_path):
    prepare(tmp_path)
    folder = join_all(tmp_path, SITES)
    for name in SITES:
        text = (tmp_path / name / "site.toml").read_text()
        (tmp_path / name / "site.toml").write_text(
            text.replace("[models]\n", f'[models]\n"{tmp_path / "model"}" = {{}}\n')
        )
    undisturbed, recipes = [], []
    for place, share in enumerate(SHARES):
        settings = [f"silos.{name}={tmp_path / f'{name}.jsonl'}" for name in SITES]
        more = ["evaluate.alone=false", "rounds=6", "client.steps=6", *share]
        here = run_here(read_recipe(tmp_path / "recipe.toml", [*settings, *more]), tmp_path / f"local_{place}")
        undisturbed.append(adapter(here))
        recipes.append(write_recipe(read_recipe(tmp_path / "recipe.toml", [*more, "federation.patience=90"])))
    commands = {
        name: [*FEDLLM, "site", "start", str(tmp_path / name / "site.toml"), "--data", str(tmp_path / f"{name}.jsonl")]
        for name in SITES
    }
    commands["server"] = [*FEDLLM, "federation", "start", str(folder)]
    kept, chance, killed, told = Kept(commands, tmp_path / "terminal.log"), random.Random(SEED), 0, []
    try:
        number = 0
        while killed < KILLS:
            number += 1
            name, end, kills = f"run_{number}", None, []
            here, recipe = undisturbed[number % len(SHARES)], recipes[number % len(SHARES)]
            assert "error" not in answer(folder, "admin@example.org", {"do": "submit", "name": name, "recipe": recipe})
            for _ in range(KILLS_A_RUN):
                wait = time.monotonic() + chance.uniform(1, 20)
                while time.monotonic() < wait and end is None:
                    end = state_of(folder, name)
                    time.sleep(0.1)
                if end is None and (targets := kept.processes()):
                    what, process = chance.choice(targets)
                    if process.is_running():
                        process.kill()
                        killed += 1
                        kills.append(what)
            last = time.monotonic()
            while end is None:
                assert time.monotonic() - last < LIMIT, (
                    f"{name} hangs after {kills}: {answer(folder, '', {'do': 'status', 'name': name})}"
                )
                time.sleep(0.2)
                end = state_of(folder, name)
            hung = time.monotonic() - last
            run = folder / "runs" / name
            assert end == "done", f"{name} {end} after {kills}: {answer(folder, '', {'do': 'status', 'name': name})}"
            dropped = {site for event in read_events(run) if event["event"] == "round" for site in event["dropped"]}
            far = adapter(run)
            same = all(torch.equal(here[key], far[key]) for key in here)
            print(f"{name}: killed {kills}; {end} {hung:.0f} s after the last, same bits {same}, {dropped}", flush=True)
            assert same or dropped
            told.append({"kills": kills, "same": same, "dropped": sorted(dropped), "seconds": round(hung, 1)})
    finally:
        kept.close()
        (tmp_path / "told.json").write_text(json.dumps(told))
    print(
        json.dumps(
            {
                "kills": killed,
                "runs": len(told),
                "same_bits": sum(t["same"] for t in told),
                "most_seconds": max(t["seconds"] for t in told),
            }
        )
    )


def state_of(folder: Path, name: str) -> str | None:
    """How a run has ended, or None."""
    told = answer(folder, "", {"do": "status", "name": name})
    state = told["runs"][name]["state"]
    return state if state in ("done", "failed", "stopped") else None
