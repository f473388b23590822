"""A server that trains nothing keeps what a run began with on disk, and learns what it would learn otherwise."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fedllm.app import lean as lean_module
from fedllm.app.build import build
from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.lead import lead
from fedllm.app.lean import lean
from fedllm.app.run import run
from fedllm.core.types import Aside
from fedllm.runtime import remote
from fedllm.runtime.store import load_checkpoint, read_events
from fedllm.silo.trainables import parameters, trained
from tests.federations import desks, line_to, make_site
from tests.tiny import write_model, write_rows


def table(place, **changes):
    return {
        "model": str(place / "model"),
        "rounds": 3,
        "threads": 1,
        "runtime": "local",
        "dtype": "float32",
        "task": {"name": "causal", "block": 24},
        "trainable": "full",
        "client": {"steps": 1, "batch_size": 2},
        "optimiser": {"name": "nesterov", "learning_rate": 0.7, "momentum": 0.5},
        "evaluate": {"alone": True, "general": {"others": str(place / "b.jsonl")}},
        **changes,
    }


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("lean")
    write_model(place / "model")
    for name in "ab":
        write_rows(
            place / f"{name}.jsonl", [{"text": f"{name} {i}: " + "the cat sat on the mat " * 3} for i in range(9)]
        )
    return place


def built(place, **changes):
    return build(read_recipe(table(place, **changes)), elsewhere=["a", "b"])


def test_what_is_trained_lies_on_disk_and_is_read_from_there(place, tmp_path, monkeypatch):
    assert lean(built(place), tmp_path).params.keys() == built(place).params.keys()
    monkeypatch.setattr(lean_module, "LARGE", 0)
    parts, before = lean(built(place), tmp_path), parameters(built(place).model)
    assert isinstance(parts.params, Aside) and not list(tmp_path.iterdir())
    assert all(torch.equal(parts.params[name], value) for name, value in before.items())
    assert {name: value.shape for name, value in trained(parts.model).items()} == {
        n: v.shape for n, v in before.items()
    }


@pytest.mark.parametrize(
    "changes",
    [{"trainable": "lora"}, {"evaluate": {"alone": False, "choice": {"mine": "a.jsonl"}}}],
    ids=["lora", "files"],
)
def test_a_model_that_the_server_uses_stays(place, tmp_path, monkeypatch, changes):
    monkeypatch.setattr(lean_module, "LARGE", 0)
    parts = built(place, **changes)
    assert lean(parts, tmp_path) is parts


def test_a_lean_server_learns_what_one_process_does_also_when_it_is_started_anew(place, tmp_path, monkeypatch):
    both = {"silos": {name: str(place / f"{name}.jsonl") for name in "ab"}}
    here = run(read_recipe(table(place, **both)), tmp_path / "here")
    monkeypatch.setattr(lean_module, "LARGE", 0)
    monkeypatch.setattr(remote, "LARGE", 0)
    far = tmp_path / "far"
    far.mkdir()
    (far / "recipe.toml").write_text(write_recipe(read_recipe(table(place))))
    (far / "run.json").write_text(json.dumps({"wanted": "run", "user": "admin@example.org"}))
    sites = [make_site(tmp_path / n, n, f'train = "{place / n}.jsonl"', str(place / "model")) for n in "ab"]
    with desks(sites) as opened:
        line = line_to(opened)

        def broken(site, head, body, seconds):
            if head["do"] == "begin" and (head["request"]["op"], head["request"]["round"]) == ("train", 2):
                raise KeyboardInterrupt
            return line.call(site, head, body, seconds)

        with pytest.raises(KeyboardInterrupt):
            lead(far, line._replace(call=broken), list("ab"))
        assert load_checkpoint(far).state.round == 2
        lead(far, line, list("ab"))
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (here, far))
    assert one.keys() == other.keys() and all(torch.equal(value, other[name]) for name, value in one.items())
    said = [
        [event for event in read_events(folder) if event["event"] in ("base", "round", "done")]
        for folder in (here, far)
    ]
    for left, right in zip(*said, strict=True):
        assert left.get("general") == right.get("general") and left.get("loss") == right.get("loss")
