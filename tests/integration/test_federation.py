"""A run over sites' desks and workers: the same bits as on one machine, refusals by rule, faults that cost a reply."""

from __future__ import annotations

import json
import random

import psutil
import pytest
import torch
from safetensors.torch import load_file

from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.lead import lead
from fedllm.app.run import run
from fedllm.core.errors import FedllmError
from fedllm.federation.site.audit import verify
from fedllm.runtime.line import Aborted, Line, Unreachable, encode
from fedllm.runtime.store import read_events
from tests.federations import desks, line_to, make_site
from tests.tiny import write_model, write_rows

NAMES = ["a", "b", "c"]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with a model and three sites' text."""
    place = tmp_path_factory.mktemp("federation")
    write_model(place / "model", chat=True)
    for number, name in enumerate(NAMES):
        rows = [{"frage": f"{name} {i}?", "response": f"the cat sat {i * (number + 2)}"} for i in range(14 + number)]
        write_rows(place / f"{name}.jsonl", rows)
    return place


@pytest.fixture(scope="module")
def recipe(place):
    files = {n: {"train": str(place / f"{n}.jsonl"), "columns": {"prompt": "frage"}} for n in NAMES}
    return read_recipe(
        {
            "model": str(place / "model"),
            "rounds": 3,
            "threads": 1,
            "runtime": "local",
            "silos": files,
            "task": {"name": "instruct", "max_tokens": 48},
            "trainable": {"name": "lora", "r": 2},
            "client": {"steps": 2, "batch_size": 2},
            # With error feedback, so that a site has something to remember.
            "transforms": [{"name": "clip", "max_norm": 0.05}, {"name": "top_k", "fraction": 0.5}],
            "evaluate": {"alone": False},
            "federation": {"patience": 5},
        }
    )


@pytest.fixture(scope="module")
def sites(place):
    """Three sites at work; the third allows plain LoRA only and lets no loss out."""
    rules = {"c": 'trainables = ["lora"]\nmetrics = ["tokens"]'}
    data = 'train = "../{}.jsonl"\ncolumns = {{ prompt = "frage" }}'
    model = str(place / "model")
    files = [make_site(place / f"site_{n}", n, data.format(n), model, rules.get(n, "")) for n in NAMES]
    with desks(files) as opened:
        yield opened


@pytest.fixture(scope="module")
def undisturbed(place, recipe):
    """The run on one machine, with the silos' own comparison."""
    with_alone = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"alone": True})})
    return run(with_alone, place / "local")


def federate(folder, recipe, line, names=NAMES):
    folder.mkdir(exist_ok=True)
    (folder / "recipe.toml").write_text(write_recipe(recipe.model_copy(update={"silos": {}})))
    (folder / "run.json").write_text(json.dumps({"wanted": "run", "user": "admin@example.org"}))
    lead(folder, line, names)
    return folder


def same_adapter(one, other):
    here, there = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, other))
    return here.keys() == there.keys() and all(torch.equal(here[name], there[name]) for name in here)


def worker_of(site_toml):
    """The process that works for a site."""
    for child in psutil.Process().children(recursive=True):
        here = "fedllm.app.worker" in child.cmdline() and child.environ().get("FEDLLM_SITE") == str(site_toml)
        if here and not child.children():
            return child
    raise AssertionError("no worker")


def rounds(folder):
    return [event for event in read_events(folder) if event["event"] == "round"]


def test_a_run_over_desks_is_the_run_on_one_machine_bit_for_bit(place, recipe, sites, undisturbed):
    asked = recipe.model_copy(update={"evaluate": recipe.evaluate.model_copy(update={"alone": True})})
    good, left = line_to(sites), bytearray()

    def call(site, head, body, seconds):
        answer = good.call(site, head, body, seconds)
        left.extend(encode(answer[0], bytes(answer[1])))
        return answer

    far = federate(place / "far", asked, Line(call, good.sites))
    assert same_adapter(undisturbed, far)
    # Much left, and no row is in it.
    assert len(left) > 10_000 and b"the cat sat" not in left
    mine, theirs = (json.loads((folder / "metrics.json").read_text()) for folder in (undisturbed, far))
    for kind in ("base", "federated", "alone"):
        assert theirs["loss"][kind] == {name: mine["loss"][kind][name] for name in ("a", "b")}
    assert mine["tokens"] == theirs["tokens"]
    live = json.loads((far / "live.json").read_text())
    assert (live["state"], live["round"]) == ("done", 3)
    assert (far / "report.html").stat().st_size > 10_000


def test_what_left_a_site_is_in_its_log_and_its_rules_hold(place, sites):
    entries = verify(place / "site_c" / "state" / "audit.jsonl").entries
    sent = [entry for entry in entries if entry["what"] == "reply" and entry.get("run") == "far"]
    assert {entry["op"] for entry in sent} >= {"train", "evaluate", "alone"}
    assert all(entry["bytes"] > 0 for entry in sent)
    assert all("loss" not in json.dumps(entry.get("scalars", entry.get("metrics", ""))) for entry in sent)


def test_a_site_that_refuses_is_left_out_by_the_rules_name_and_the_others_go_on(place, recipe, sites):
    dora = recipe.model_copy(update={"trainable": {"name": "dora", "r": 2}, "rounds": 1})
    folder = federate(place / "dora", dora, line_to(sites))
    asked = read_events(folder)[0]
    assert asked["sites"] == ["a", "b"]
    assert "dora" in asked["refused"]["c"]
    assert rounds(folder)[0]["clients"] == 2
    refusals = [e for e in verify(place / "site_c" / "state" / "audit.jsonl").entries if e["what"] == "refuse"]
    assert refusals[-1]["rule"] == "trainables"


def test_a_site_is_told_of_no_rows_but_its_own(place, recipe, sites):
    good, asked = line_to(sites), {}

    def call(site, head, body, seconds):
        asked[site] = head["recipe"]["without"]
        if len(asked) == len(NAMES):
            raise Aborted("That is enough.")
        return good.call(site, head, body, seconds)

    rows = {"a": ["00aa"], "b": ["00bb", "11bb"]}
    gone = recipe.without.model_copy(update={"rows": rows, "norms": {"a": [0.5]}, "silos": ["c"]})
    with pytest.raises(Aborted):
        federate(place / "gone", recipe.model_copy(update={"without": gone, "transforms": []}), Line(call, good.sites))
    own = {name: {name: rows[name]} if name in rows else {} for name in NAMES}
    assert asked == {name: {"silos": [], "rows": own[name], "norms": {}} for name in NAMES}


def test_where_too_few_take_part_the_run_ends_with_the_reason(place, recipe, sites):
    every = recipe.federation.model_copy(update={"least": 3})
    dora = recipe.model_copy(update={"trainable": {"name": "dora", "r": 2}, "federation": every})
    with pytest.raises(FedllmError, match=r"2 of 3 sites take part.*dora"):
        federate(place / "few", dora, line_to(sites))
    assert json.loads((place / "few" / "live.json").read_text())["state"] == "failed"


@pytest.mark.parametrize("seed", range(4))
def test_a_run_that_the_engine_ends_anywhere_goes_on_to_the_same_bits(place, recipe, sites, undisturbed, seed):
    good, chance = line_to(sites), random.Random(seed)
    left = chance.randrange(5, 90)

    def call(site, head, body, seconds):
        nonlocal left
        left -= 1
        if left < 0:
            raise Aborted("The engine ended the run.")
        return good.call(site, head, body, seconds)

    folder = place / f"ended_{seed}"
    for _ in range(20):
        try:
            federate(folder, recipe, Line(call, good.sites))
            break
        except Aborted:
            left = chance.randrange(20, 120)
    assert same_adapter(undisturbed, folder)


def test_a_dead_worker_is_one_missing_reply_and_a_fresh_child_in_the_next_round(place, recipe, sites):
    good, worker, killed = line_to(sites), worker_of(place / "site_b" / "site.toml"), []

    def call(site, head, body, seconds):
        answer = good.call(site, head, body, seconds)
        request = head.get("request", {})
        if head["do"] == "begin" and site == "b" and request["op"] == "train" and request["round"] == 1:
            worker.kill()
            killed.append(worker.pid)
        return answer

    folder = federate(place / "killed", recipe, Line(call, good.sites))
    assert killed
    assert [event["clients"] for event in rounds(folder)] == [3, 2, 3]
    assert "died" in rounds(folder)[1]["dropped"]["b"]


def test_a_site_that_is_away_for_a_round_is_counted_and_taken_back(place, recipe, sites):
    good, away = line_to(sites), {"b": False}

    def call(site, head, body, seconds):
        request = head.get("request", {})
        if site == "b" and head["do"] == "begin" and request["op"] == "train":
            away["b"] = request["round"] == 1
        elif site == "a" and head["do"] == "begin" and request["op"] == "evaluate":
            away["b"] = False
        if away.get(site):
            raise Unreachable(f"{site} does not answer")
        return good.call(site, head, body, seconds)

    folder = federate(place / "away", recipe, Line(call, good.sites))
    assert [event["clients"] for event in rounds(folder)] == [3, 2, 3]
    assert "b" in rounds(folder)[1]["dropped"]
