"""Soft prompts through whole runs: personal tokens, layers by score, bad settings; resumed, and between sites."""

from __future__ import annotations

import json
from io import StringIO

import pytest
from rich.console import Console
from safetensors.torch import load_file

from fedllm.app.build import build
from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.lead import lead
from fedllm.app.progress import Ui
from fedllm.app.results import comparisons
from fedllm.app.run import resume, run
from fedllm.core.errors import FedllmError, Interrupted
from fedllm.runtime.store import load_checkpoint, read_events
from tests.federations import desks, line_to, make_site
from tests.tiny import write_model, write_rows

NAMES = ["a", "b"]
KINDS = {
    "personal": {"trainable": {"name": "prompt", "tokens": 4, "personal": 2}},
    "scored": {"trainable": {"name": "prefix", "tokens": 2}, "share": {"name": "scored_layers", "layers": 1}},
    "encoder": {"trainable": {"name": "p_tuning", "tokens": 4, "hidden": 8}},
}

NOISY = {"name": "dp_sgd", "steps": 2, "batch_size": 4, "clip": 1.0, "noise": 1.0}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("prompts")
    write_model(place / "model")
    for number, name in enumerate(NAMES):
        rows = [{"text": f"{name} {i * (number + 2)}", "label": "10"[i % 3 == number]} for i in range(16)]
        write_rows(place / f"{name}.jsonl", rows)
    return place


def recipe(place, **changes):
    return read_recipe(
        {
            "model": str(place / "model"),
            "rounds": 2,
            "threads": 1,
            "silos": {name: str(place / f"{name}.jsonl") for name in NAMES},
            "data": {"held_out": 0.3},
            "task": {"name": "classify", "words": {"1": "positive", "0": "negative"}, "max_tokens": 64},
            "client": {"steps": 2, "batch_size": 2, "learning_rate": 0.05},
            "evaluate": {"alone": False},
            "federation": {"patience": 5},
            **changes,
        }
    )


def numbers(folder):
    rounds = [event for event in read_events(folder) if event["event"] == "round"]
    kept = ("loss", "accuracy", "calibrated", "without_own", "layers")
    return [{key: event[key] for key in kept if key in event} for event in rounds]


class Stopped(Ui):
    """Stops in the second round, as a person would."""

    left: int | None = None

    def say(self, line):
        super().say(line)
        if line.startswith("round 1 of"):
            self.left = 3

    def tick(self, tokens):
        if self.left is not None:
            self.left -= 1
            if self.left == 0:
                raise Interrupted("stopped")


@pytest.fixture(scope="module")
def site(place):
    """One site at work."""
    file = make_site(place / "site_a", "a", f'train = "{place / "a.jsonl"}"', str(place / "model"))
    with desks([file]) as opened:
        yield opened


def same(one, other):
    assert numbers(one) == numbers(other)
    left, right = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    assert left.keys() == right.keys() and all((left[name] == right[name]).all() for name in left)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_was_stopped_goes_on_to_the_same_bits(kind, place, tmp_path):
    own = recipe(place, runtime="local", **KINDS[kind])
    straight = run(own, tmp_path / "straight")
    with pytest.raises(Interrupted):
        run(own, tmp_path / "stopped", ui=Stopped(None))
    assert len(numbers(tmp_path / "stopped")) == 1
    same(resume(tmp_path / "stopped"), straight)
    metrics = json.loads((straight / "metrics.json").read_text())
    assert set(metrics["calibrated"]["federated"]) == set(NAMES)
    shown = Console(width=120, record=True, file=StringIO())
    shown.print(comparisons(metrics))
    assert [line.split(" per silo")[0] for line in shown.export_text().splitlines() if " per silo" in line] == [
        "Held-out loss",
        "Accuracy",
        "Accuracy",
    ]
    if kind != "encoder":
        assert metrics["loss"]["shared part only"] != metrics["loss"]["federated"]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["personal", "scored"])
def test_between_machines_it_is_the_same_run_and_what_stays_is_nowhere_at_the_server(kind, place, site, tmp_path):
    own = recipe(place, runtime="local", silos={"a": str(place / "a.jsonl")}, **KINDS[kind])
    folder = tmp_path / kind
    folder.mkdir()
    (folder / "recipe.toml").write_text(write_recipe(own))
    (folder / "run.json").write_text(json.dumps({"user": "u"}))
    lead(folder, line_to(site), ["a"])
    same(run(own, tmp_path / "straight"), folder)
    written = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    assert b"default.personal" not in written
    if kind == "personal":
        memory = load_checkpoint(tmp_path / "straight").memory["a"]["work/personal/prompt_encoder.default.personal"]
        assert memory.shape == (2, 32) and memory.numpy().tobytes() not in written
        assert list(load_checkpoint(folder).state.params) == ["prompt_encoder.default.shared"]


@pytest.mark.filterwarnings("ignore")
def test_a_cohort_of_prompts_is_chosen_by_itself_and_gives_the_same(place, tmp_path):
    for kind in ("personal", "scored"):
        alone = run(recipe(place, runtime="local", **KINDS[kind]), tmp_path / f"{kind} alone")
        together = run(recipe(place, **KINDS[kind]), tmp_path / f"{kind} together")
        start = read_events(together)[0]
        assert start["runtime"].startswith("cohort")
        for one, other in zip(numbers(alone), numbers(together), strict=True):
            assert one["loss"] == pytest.approx(other["loss"], abs=1e-3)


def test_layers_are_scored_by_those_who_are_there_and_once_somebody_is(place, tmp_path):
    late = run(recipe(place, availability={"silos": {"b": {"from": 2}}}, **KINDS["scored"]), tmp_path / "late")
    alone = run(recipe(place, silos={"a": str(place / "a.jsonl")}, **KINDS["scored"]), tmp_path / "alone")
    # What "b" would have said of the layers is not in the first round's choice.
    assert numbers(late)[0]["layers"] == numbers(alone)[0]["layers"]
    lost = run(recipe(place, availability={"drop": 0.999999}, **KINDS["scored"]), tmp_path / "lost")
    assert json.loads((lost / "metrics.json").read_text())["dropped"] == 4
    assert "layers/scores" not in load_checkpoint(lost).state.transforms


def test_with_noise_on_every_record_a_personal_prompt_trains_and_stays(place, tmp_path):
    noisy = numbers(run(recipe(place, client=NOISY, **KINDS["personal"]), tmp_path / "run"))
    assert noisy[0]["loss"] != noisy[1]["loss"] and "without_own" in noisy[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"trainable": {"name": "prompt", "tokens": 600}}, "600 tokens but the model's context is 512"),
        ({"trainable": {"name": "prompt", "tokens": 508}}, "508 tokens and the longest text .* task.max_tokens"),
        ({"trainable": {"name": "prompt", "tokenizer": "x"}}, "trainable.tokenizer is 'x'"),
        ({**KINDS["encoder"], "runtime": "cohort"}, "a soft prompt without an encoder at the silo"),
        ({**KINDS["personal"], "share": {"name": "fragments", "count": 1}}, "trainable.personal = 0"),
        ({**KINDS["scored"], "share": {"name": "scored_layers", "layers": 9}}, "has 2 layers; lower it"),
        ({**KINDS["scored"], "client": NOISY}, "tell scores without noise"),
        ({**KINDS["encoder"], "processes": 2}, "an encoder of its own, which is in one process"),
        ({**KINDS["personal"], "algorithm": {"name": "black_box"}}, "no part that stays at a silo"),
    ],
)
def test_what_does_not_fit_is_a_sentence_before_anything_is_trained(changes, reason, place):
    with pytest.raises(FedllmError, match=reason):
        build(recipe(place, **changes))
