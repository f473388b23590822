"""Data work by a recipe: texts that several silos have, lines that are not UTF-8; and what was forgotten."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

import fedllm
from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.data import open_shards
from fedllm.app.lead import lead
from fedllm.app.progress import Ui
from fedllm.core.errors import FedllmError, Interrupted
from fedllm.runtime.line import Aborted, Line
from fedllm.runtime.store import read_events
from tests.federations import desks, line_to, make_site
from tests.tiny import write_model

TEXT = "the cat sat on the mat and the dog did not but it was there as well"
WORDS = TEXT.split()
SHARED = [f"Everyone has the text number {number}, word for word." for number in range(12)]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model, two silos' text of which some is the same, and general text."""
    place = tmp_path_factory.mktemp("work")
    write_model(place / "model")
    for step, name in enumerate(("a", "b"), 3):
        own = [" ".join(WORDS[(i * 5 + j * step) % len(WORDS)] for j in range(20)) + f" {name}{i}" for i in range(24)]
        spelled = [text.upper() if name == "b" else text for text in SHARED]
        lines = [json.dumps({"text": text}) for text in [*own, *spelled]]
        (place / f"{name}.jsonl").write_bytes("\n".join(lines).encode() + b'\n{"text": "caf\xe9"}\n' * step)
    (place / "general.jsonl").write_text(json.dumps({"text": " ".join(WORDS) * 12}))
    return place


def recipe(place, **changes):
    table = {
        "model": str(place / "model"),
        "rounds": 2,
        "threads": 1,
        "dtype": "float32",
        "runtime": "local",
        "data": {"root": str(place), "limit_test": 0},
        "silos": {"a": "a.jsonl", "b": "b.jsonl"},
        "cleaning": [{"name": "utf8"}, {"name": "exact_duplicates"}],
        "duplicates": {},
        "task": {"name": "causal", "block": 16},
        "trainable": {"name": "lora", "r": 2},
        "client": {"steps": 3, "batch_size": 2},
        "evaluate": {"alone": False, "examples": 4, "general": "general.jsonl", "limit": 3},
    }
    return read_recipe(table | changes)


def test_a_text_of_two_silos_is_left_at_one_of_them_and_all_is_counted(place):
    shards = open_shards(recipe(place))
    texts = {name: [row["text"].lower() for row in (*each.train, *each.test)] for name, each in shards.items()}
    everything = sorted(texts["a"] + texts["b"])
    assert len(everything) == len(set(everything)) == 24 + 24 + 12
    gone = {name: each.cleaned["2.shared_duplicates.dropped"] for name, each in shards.items()}
    assert sum(gone.values()) == 12 and all(gone.values())
    assert [each.cleaned["lines that are not UTF-8"] for each in shards.values()] == [3, 4]
    assert all(each.cleaned["kept"] == len(each.train) + len(each.test) for each in shards.values())
    assert open_shards(recipe(place)) == shards
    whole = open_shards(recipe(place, duplicates=None))
    assert all(len(whole[name].train) + len(whole[name].test) == 36 for name in whole)


def test_a_run_tells_of_its_data_work_and_of_what_was_forgotten_and_a_resumed_one_is_the_same(place, tmp_path):
    run = fedllm.run(recipe(place), tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["general"]["base"].keys() == metrics["general"]["federated"].keys() == {"general"}
    assert metrics["general"]["base"] != metrics["general"]["federated"]
    page = (run / "report.html").read_text()
    for said in ("Data work at the silos", "shared duplicates: dropped", "lines that are not UTF-8", "was forgotten"):
        assert said in page, said

    class Stop(Ui):
        steps = 0

        def tick(self, tokens):
            Stop.steps += 1
            if Stop.steps == 14:
                raise Interrupted
            super().tick(tokens)

    with pytest.raises(Interrupted):
        fedllm.run(recipe(place), tmp_path / "stopped", ui=Stop(None))
    assert same(run, fedllm.resume(tmp_path / "stopped"))


def same(*runs):
    one, other = (load_file(run / "adapter" / "adapter_model.safetensors") for run in runs)
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_with_one_step_of_sgd_a_round_federated_is_pooled_on_the_same_batches(place, tmp_path):
    client = {"steps": 1, "batch_size": 2, "optimiser": "sgd", "learning_rate": 0.5, "weight": "tokens"}
    evaluate = {"alone": False, "pooled": "same_batches"}
    asked = recipe(place, rounds=4, client=client | {"max_grad_norm": 0.0}, evaluate=evaluate)
    losses = json.loads((fedllm.run(asked, tmp_path / "run") / "metrics.json").read_text())["loss"]
    assert losses["pooled"] == pytest.approx(losses["federated"], abs=2e-5)
    assert losses["pooled"]["a"] < losses["base"]["a"] - 0.01


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"duplicates": {"text": "prompt"}}, "no column 'prompt'"),
        ({"data": {"root": ".", "not_utf8": "refuse"}}, "line 37: not UTF-8"),
        ({"evaluate": {"general": "none.jsonl"}}, "evaluate.general.none: there is no"),
        ({"silos": {"a": "a.jsonl"}}, "there is one"),
        ({"silos": {"a": "a.jsonl", "b": "a.jsonl"}, "data": {"limit_test": 1}}, "take .duplicates. out"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_anything_is_trained(place, tmp_path, changes, sentence):
    if "data" in changes:
        changes = changes | {"data": changes["data"] | {"root": str(place)}}
    with pytest.raises(FedllmError, match=sentence):
        fedllm.run(recipe(place, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def sites(place):
    """Two sites with a salt between them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SALT_OF_SITES", "0123456789abcdef-of-the-sites")
        model, data = str(place / "model"), 'train = "../{}.jsonl"'
        yield [make_site(place / f"site_{name}", name, data.format(name), model) for name in ("a", "b")]


def federate(folder, asked, line):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(write_recipe(asked.model_copy(update={"silos": {}})))
    (folder / "run.json").write_text(json.dumps({"wanted": "run", "user": "admin@example.org"}))
    lead(folder, line, ["a", "b"])
    return folder


def test_sites_find_what_both_have_and_know_it_after_a_restart(place, sites):
    asked = recipe(place, duplicates={"salt": "SALT_OF_SITES"}, federation={"patience": 5})
    with desks(sites) as opened:
        far = federate(place / "far", asked, line_to(opened))
        events = {event["event"]: event for event in read_events(far)}
        assert sum(events["duplicates"]["dropped"].values()) == 12 and not events["duplicates"]["absent"]
        cleaned = events["start"]["cleaned"]
        told = {name: cleaned[name]["2.shared_duplicates.dropped"] for name in ("a", "b")}
        assert told == events["duplicates"]["dropped"]
        assert [cleaned[name]["lines that are not UTF-8"] for name in ("a", "b")] == [3, 4]
        assert sum(sum(held.values()) for held in events["start"]["silos"].values()) > 0
        general = json.loads((far / "metrics.json").read_text())["general"]
        assert general.keys() == {"base", "federated"} and general["base"] != general["federated"]
        line = line_to(opened)

        def ending(site, head, body, seconds):
            if head["do"] == "begin" and head["request"]["op"] == "train" and head["request"]["round"] == 1:
                raise Aborted("the engine ended the job")
            return line.call(site, head, body, seconds)

        with pytest.raises(Aborted):
            federate(place / "again", asked, Line(ending, line.sites))
    with desks(sites) as opened:  # new workers, which have only what is on disk
        assert same(far, federate(place / "again", asked, line_to(opened)))
        with pytest.raises(FedllmError, match=r"0 of 2 took part .*NO_SUCH_SALT"):
            federate(place / "saltless", recipe(place, duplicates={"salt": "NO_SUCH_SALT"}), line_to(opened))
