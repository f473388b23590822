"""A federation between machines, from nothing to an exported adapter, by the commands that the documentation gives."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from fedllm.app.config import read_recipe
from fedllm.app.run import run as run_here
from tests.networks import Slow, machines, on
from tests.tiny import write_model, write_rows

pytest.importorskip("nvflare", reason="the extra fedllm[federation] is not installed")

SITES = ["a", "b", "c"]
FEDLLM = [sys.executable, "-m", "fedllm"]

RECIPE = """\
name = "tiny"
model = "{model}"
rounds = 2
threads = 1
runtime = "local"
[task]
name = "instruct"
max_tokens = 48
[trainable]
name = "lora"
r = 2
[client]
steps = 2
batch_size = 2
"""


def prepare(place: Path) -> None:
    """What is there before: a base model that everybody has, each site's text, and a recipe."""
    write_model(place / "model", chat=True)
    for number, name in enumerate(SITES):
        rows = [{"prompt": f"{name} {i}?", "response": f"the cat sat {i * (number + 2)}"} for i in range(14 + number)]
        write_rows(place / f"{name}.jsonl", rows)
    (place / "recipe.toml").write_text(RECIPE.format(model=place / "model"))


class Machine:
    """A machine on which commands are typed."""

    def __init__(self, name: str, folder: Path) -> None:
        self.name, self.folder = name, folder
        folder.mkdir(exist_ok=True)

    def types(self, *command: str, seconds: float = 900, code: int = 0) -> str:
        """Type a fedllm command and return what it prints."""
        done = subprocess.run(
            on(self.name, *FEDLLM, *command), cwd=self.folder, capture_output=True, text=True, timeout=seconds
        )
        assert done.returncode == code, f"{command}: {done.stdout}\n{done.stderr}"
        return done.stdout + done.stderr

    @contextmanager
    def keeps(self, *command: str):
        """Keep a command running, and end it as systemd would."""
        log = (self.folder / "terminal.log").open("ab")
        process = subprocess.Popen(on(self.name, *FEDLLM, *command), cwd=self.folder, stdout=log, stderr=log)
        try:
            yield process
        finally:
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
            log.close()


@contextmanager
def federation(place: Path, slow: dict[str, Slow] | None = None, policies: dict[str, str] | None = None):
    """Set a federation up by its commands, start it, and yield its machines by name."""
    with machines(["server", *SITES], slow) as at, ExitStack() as stack:
        them = {name: Machine(name, place / f"machine_{name}") for name in ["server", *SITES]}
        server = them["server"]
        (server.folder / "consortium.toml").write_text(
            f'name = "three"\nserver = {{ address = "{at["server"]}", port = 8002 }}\n'
            f'admin = "admin@example.org"\nsites = {json.dumps(SITES)}\n'
        )
        server.types("federation", "init", "consortium.toml")
        for name in SITES:
            site = them[name]
            site.types("site", "request", name)
            model = f'[models]\n"{place / "model"}" = {{}}\n'
            text = (site.folder / "site.toml").read_text().replace("[models]\n", model)
            (site.folder / "site.toml").write_text(text + (policies or {}).get(name, ""))
            shutil.copy(site.folder / f"{name}.request", server.folder)
            server.types("federation", "approve", f"{name}.request")
            shutil.copy(server.folder / f"{name}.approved", site.folder)
        stack.enter_context(server.keeps("federation", "start"))
        for name in SITES:
            shutil.copy(place / f"{name}.jsonl", them[name].folder / "my.jsonl")
            stack.enter_context(them[name].keeps("site", "start", "--data", "my.jsonl"))
        yield them


def on_one_machine(place: Path, *settings: str) -> Path:
    """The same recipe and text in one process."""
    texts = [f"silos.{name}={place / f'{name}.jsonl'}" for name in SITES]
    return run_here(read_recipe(place / "recipe.toml", [*texts, *settings]), place / "local")


def adapter(run: Path):
    return load_file(run / "adapter" / "adapter_model.safetensors")


def adapter_or_model(run: Path):
    """A run's result, whichever it is."""
    return adapter(run) if (run / "adapter").exists() else load_file(run / "model" / "model.safetensors")


def test_from_nothing_to_an_adapter_that_is_the_one_of_one_machine(tmp_path):
    prepare(tmp_path)
    with federation(tmp_path) as them:
        begun = time.monotonic()
        printed = them["server"].types("federation", "run", str(tmp_path / "recipe.toml"))
        seconds = time.monotonic() - begun
        assert "select and share" in printed
        assert "round 2 of 2: 3 silos" in printed, printed
        far = adapter(them["server"].folder / "runs" / "tiny")
        audit = them["a"].types("site", "audit")
        status = them["server"].types("federation", "status")
        assert "alive" in them["a"].types("site", "health")
    here = adapter(on_one_machine(tmp_path))
    assert here.keys() == far.keys() and all(torch.equal(here[name], far[name]) for name in here)
    assert "nothing was changed" in audit and "train" in audit
    assert "done" in status
    assert seconds < 240
