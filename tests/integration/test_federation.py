"""A run over sites' desks and workers: the same bits as on one machine, refusals by rule, faults that cost a reply."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tests.federations import desks, line_to, make_site
from tests.tiny import tiny_model, tiny_tokenizer

from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.lead import lead
from fedllm.app.run import run
from fedllm.core.errors import FedllmError
from fedllm.runtime.store import read_events

NAMES = ["a", "b", "c"]


@pytest.fixture
def model(tmp_path):
    folder = tmp_path / "model"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return str(folder)


@pytest.fixture
def recipe(tmp_path, model):
    for number, name in enumerate(NAMES):
        rows = [{"prompt": f"{name} {i}?", "response": f"the cat sat {i * (number + 2)}"} for i in range(14 + number)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return read_recipe(
        {
            "model": model,
            "rounds": 2,
            "threads": 1,
            "runtime": "local",
            "silos": {name: str(tmp_path / f"{name}.jsonl") for name in NAMES},
            "task": {"name": "instruct", "max_tokens": 48},
            "trainable": {"name": "lora", "r": 2},
            "client": {"steps": 2, "batch_size": 2},
            "transforms": [{"name": "clip", "max_norm": 0.05}, {"name": "top_k", "fraction": 0.5}],
            "federation": {"patience": 20},
        }
    )


def sites(tmp_path, model, policy=""):
    return [make_site(tmp_path / f"site_{n}", n, f'train = "../{n}.jsonl"', model, policy) for n in NAMES]


def federate(folder, recipe, line, names=NAMES):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(write_recipe(recipe.model_copy(update={"silos": {}})))
    (folder / "run.json").write_text(json.dumps({"wanted": "run", "user": "admin@example.org"}))
    lead(folder, line, names)


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def test_a_run_over_desks_is_the_run_on_one_machine_bit_for_bit(tmp_path, model, recipe):
    local = run(recipe, tmp_path / "local")
    with desks(sites(tmp_path, model)) as opened:
        federate(tmp_path / "far", recipe, line_to(opened))
    here, far = adapter(local), adapter(tmp_path / "far")
    assert here.keys() == far.keys()
    assert all(torch.equal(here[name], far[name]) for name in here)
    mine, theirs = (json.loads((f / "metrics.json").read_text()) for f in (local, tmp_path / "far"))
    assert mine["loss"]["federated"] == theirs["loss"]["federated"]
    assert mine["loss"]["base"] == theirs["loss"]["base"]
    assert mine["loss"]["alone"] == theirs["loss"]["alone"]
    assert mine["tokens"] == theirs["tokens"]
    live = json.loads((tmp_path / "far" / "live.json").read_text())
    assert live["state"] == "done" and live["round"] == 2
    assert (tmp_path / "far" / "report.html").stat().st_size > 10_000
