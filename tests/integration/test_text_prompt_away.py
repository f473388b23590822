"""The search of a text prompt with its model behind an endpoint that is served for real: proposals, scores, budgets."""

from __future__ import annotations

import json
import re

import pytest

from fedllm.app.config import read_recipe
from fedllm.app.run import run
from fedllm.core.texts import texts_in
from fedllm.runtime.store import load_checkpoint, read_events
from fedllm.silo import endpoint
from tests.endpoints import served, tiny_app
from tests.tiny import write_rows

SILOS = "ab"
ROW = re.compile(r"the [cm]at [ab] \d+")
SEARCH = {"name": "text_prompt", "prompt": "Say it. Be kind.", "candidates": 4, "keep": 2, "examples": 4}


@pytest.fixture(scope="module")
def url():
    with served(tiny_app()) as found:
        yield found


def recipe_for(folder, url, algorithm, **more):
    for name in SILOS:
        rows = [{"text": f"the {'cat' if i % 2 else 'mat'} {name} {i}", "label": str(i % 2)} for i in range(12)]
        write_rows(folder / f"{name}.jsonl", rows)
    table = {
        "model": "endpoint",
        "endpoint": {"url": url, "model": "tiny", "tries": 2, **more.pop("endpoint", {})},
        "rounds": 2,
        "device": "cpu",
        "data": {"root": str(folder), "limit_test": 4, "held_out": 0.3},
        "silos": {name: f"{name}.jsonl" for name in SILOS},
        "evaluate": {"alone": False},
        "task": {"name": "classify", "words": ["0", "1"]},
        "algorithm": {**SEARCH, "calls": 400, **algorithm},
    }
    return read_recipe({**table, **more})


def rounds_in(folder):
    return [event for event in read_events(folder) if event["event"] == "round"]


@pytest.mark.parametrize("proposer", ["model", "both", "critique"])
def test_what_the_model_at_the_endpoint_writes_is_tried_and_paid_for(url, proposer, tmp_path):
    folder = run(recipe_for(tmp_path, url, {"proposer": proposer}), tmp_path / "run")
    first, last = rounds_in(folder)
    scored = 2 * 4 * 4
    # All that is more than scoring is the model's writing: at the server, or at each silo after another look.
    written = {"model": 3, "both": 1, "critique": 0}[proposer]
    if proposer == "critique":
        looked = [first["calls"][name] - 4 * 4 for name in SILOS]
        assert all(each in (4, 5, 6) for each in looked)
        assert first["copied"] == {"a": 0.0, "b": 0.0} and first["bytes_up"] > 0
        assert first["calls_spent"] == scored + sum(looked)
    else:
        assert first["calls_spent"] <= scored + written and first["calls_spent"] > written
    assert last["calls_left"] == 400 - last["calls_spent"] and last["accuracy"].keys() == set(SILOS)
    spent = json.loads((folder / "spent.json").read_text())
    assert spent["calls"] > 0 and spent["read"] > 0


def test_a_critique_lets_no_run_of_a_silos_words_leave(url, tmp_path, monkeypatch):
    heard = []

    def quoting(self, conversations, writing):
        heard.extend(turns[0].content for turns in conversations)
        return [f"Take care with {ROW.search(turns[0].content).group()}, please." for turns in conversations]

    monkeypatch.setattr(endpoint.Endpoint, "write", quoting)
    recipe = recipe_for(tmp_path, url, {"proposer": "critique"}, leaks={"n": 4}, rounds=1)
    folder = run(recipe, tmp_path / "run")
    (event,) = rounds_in(folder)
    assert any("get wrong answers" in each and "Right: " in each for each in heard)
    offered = texts_in("offered", load_checkpoint(folder).state.params)
    assert offered == ["Take care with [...], please."] * len(offered) and offered
    assert sum(event["copied"].values()) == len(offered)


def test_a_critique_lets_no_personal_data_leave(url, tmp_path, monkeypatch):
    pytest.importorskip("presidio_analyzer", reason="the extra 'pii' is not installed")

    def telling(self, conversations, writing):
        return ["Ask jane.doe@example.com first."] * len(conversations)

    monkeypatch.setattr(endpoint.Endpoint, "write", telling)
    folder = run(recipe_for(tmp_path, url, {"proposer": "critique"}, rounds=1), tmp_path / "run")
    offered = texts_in("offered", load_checkpoint(folder).state.params)
    assert offered == ["Ask <EMAIL_ADDRESS> first."] * len(offered) and offered
    assert sum(rounds_in(folder)[0]["personal"].values()) == len(offered)


def test_a_silo_whose_endpoint_is_down_sits_out_and_its_share_of_the_round_is_spent(url, tmp_path, monkeypatch):
    held, calls = endpoint.Endpoint.score, []

    def failing(self, pairs):
        calls.append(1)
        # Two looks at the base come first; then `a` of the first round.
        if len(calls) == 3:
            raise endpoint.Unanswered("it was away")
        return held(self, pairs)

    monkeypatch.setattr(endpoint.Endpoint, "score", failing)
    first, last = rounds_in(run(recipe_for(tmp_path, url, {}), tmp_path / "run"))
    assert first["dropped"] == {"a": "its model did not answer: it was away"} and first["clients"] == 1
    assert last["clients"] == 2 and not last["dropped"]
    # Its share is what a round can take, not a half of all that is left.
    assert first["calls_spent"] == 2 * 4 * 4 and last["calls_spent"] == 4 * 4 * 4


def test_when_nobody_answers_the_server_the_silos_go_on_with_what_there_is(url, tmp_path, monkeypatch):
    def away(self, conversations, writing):
        raise endpoint.Unanswered("it was away")

    monkeypatch.setattr(endpoint.Endpoint, "write", away)
    first, last = rounds_in(run(recipe_for(tmp_path, url, {"proposer": "model"}), tmp_path / "run"))
    assert first["proposer_unanswered"] == "it was away" and first["clients"] == 2
    # Three paraphrases that may have been paid for, and one prompt with four examples at two silos.
    assert first["calls_spent"] == 3 + 2 * 4
    assert last["prompt"] == SEARCH["prompt"]


def test_requests_tokens_and_money_stop_at_the_endpoints_own_budget(url, tmp_path):
    budget = {"tokens": 5_000, "cost": 0.05, "price_read": 2.0, "price_written": 8.0}
    recipe = recipe_for(tmp_path, url, {"proposer": "both"}, endpoint=budget, rounds=4)
    folder = run(recipe, tmp_path / "run")
    spent = json.loads((folder / "spent.json").read_text())
    assert 0 < spent["read"] + spent["written"] <= 5_000 and spent["cost"] <= 0.05
    assert spent["cost"] == pytest.approx((2 * spent["read"] + 8 * spent["written"]) / 1e6)
    assert any("has no room" in why for event in rounds_in(folder) for why in event["dropped"].values())
    assert len(rounds_in(folder)) == 4
