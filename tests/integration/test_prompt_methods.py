"""Methods that send prompts, run as a user runs them: here, behind an API that fails now and then, and at sites."""

from __future__ import annotations

import json
import threading

import pytest
import torch

from fedllm.app.build import build
from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.lead import lead
from fedllm.app.plan_view import plan_lines
from fedllm.app.progress import Ui
from fedllm.app.run import resume, run
from fedllm.core.errors import FedllmError, Interrupted
from fedllm.runtime.store import load_checkpoint, read_events
from fedllm.silo import endpoint
from tests.endpoints import served, tiny_app
from tests.federations import desks, line_to, make_site
from tests.tiny import write_model

WORDS = {"0": "negative", "1": "positive"}
METHODS = {
    "exemplars": {"pool": "pool.jsonl", "shots": 2, "candidates": 2, "questions": 4},
    "templates": {"library": ["Say: {text} ->"], "questions": 4, "offer": 1},
    "text_prompt": {
        "prompt": "Say it. Be kind.",
        "calls": 400,
        "candidates": 4,
        "keep": 2,
        "examples": 4,
        "proposer": "critique",
    },
    "fed_sp_sc": {"samples": 2, "tokens": 4},
    "fed_dp_cot": {"public": "public.jsonl", "samples": 2, "tokens": 4, "batch": 2, "own": 1, "agreement": 0.3},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("asking")
    write_model(folder / "model", chat=True)
    for name in "ab":
        rows = [{"text": f"the {'cat' if i % 2 else 'mat'} {name} {i}", "label": str(i % 2)} for i in range(12)]
        write_rows(folder / f"{name}.jsonl", rows)
        sums = [{"id": i, "prompt": f"{name}: {i} and 1?", "response": f"#### {i + 1}"} for i in range(12)]
        write_rows(folder / f"sums_{name}.jsonl", sums)
    write_rows(folder / "pool.jsonl", [{"text": f"one {i}", "label": str(i % 2)} for i in range(6)])
    write_rows(folder / "public.jsonl", [{"prompt": f"public {i}?", "response": "1"} for i in range(4)])
    (folder / "own.txt").write_text("Is it?\n{text}\nLabel:\n---\nthe cat a 1 {text} is number one of all of them\n")
    return folder


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def recipe_for(place, name, **changes):
    sums = name.startswith("fed_")
    files = {each: {"train": f"{'sums_' * sums}{each}.jsonl"} for each in "ab"}
    if name == "templates":
        files["a"]["templates"] = "own.txt"
    table = {
        "model": str(place / "model"),
        "rounds": 2,
        "dtype": "float32",
        "device": "cpu",
        "data": {"root": str(place), "limit_test": 4, "held_out": 0.3},
        "silos": files,
        "evaluate": {"alone": False},
        "task": {"name": "instruct"} if sums else {"name": "classify", "words": WORDS},
        "algorithm": {"name": name, **METHODS[name]},
        "leaks": {"n": 4},
    }
    return read_recipe({**table, **changes})


def at_endpoint(url, **more):
    return {"model": "endpoint", "endpoint": {"url": url, "model": "tiny", "tries": 2, **more}}


def params(folder):
    return load_checkpoint(folder).state.params


def same(one, other, within=0.0):
    """Whether two states are the same, numbers up to `within` and what is no number where it is none."""
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(other[name], value, rtol=0, atol=within, equal_nan=True, msg=name)
    return True


@pytest.fixture(scope="module")
def here(place):
    """Every method, run in this process."""
    return {name: run(recipe_for(place, name), place / "here" / name) for name in METHODS}


@pytest.mark.parametrize("name", METHODS)
def test_a_method_runs_and_leaves_a_prompt_to_be_used_elsewhere(here, name):
    rounds = [event for event in read_events(here[name]) if event["event"] == "round"]
    assert [event["clients"] for event in rounds] == [2, 2]
    assert rounds[-1]["accuracy"].keys() == {"a", "b"}
    prompt = json.loads((here[name] / "prompt" / "prompt.json").read_text())
    if name == "text_prompt":
        assert prompt["template"].count("{text}") == 1
    else:
        assert prompt["prompt"].count("{text}") == 1
        compile((here[name] / "prompt" / "ask.py").read_text(), "ask.py", "exec")
    assert (here[name] / "report.html").exists()


GREEDY = {"templates": {"offer": 0}, "text_prompt": {"proposer": "edits"}}
"""What lets no model write, whose dice fall elsewhere at an endpoint."""


@pytest.mark.parametrize("name", ["exemplars", "templates", "text_prompt"])
def test_through_an_endpoint_the_same_is_chosen(place, here, name, tmp_path):
    changes = {"algorithm": {"name": name, **METHODS[name], **GREEDY.get(name, {})}}
    with served(tiny_app()) as url:
        near = run(recipe_for(place, name, **changes), tmp_path / "near")
        far = run(recipe_for(place, name, **changes, **at_endpoint(url)), tmp_path / "far")
    assert same(params(near), params(far), within=1e-3)
    near_loss, far_loss = ([e["loss"] for e in read_events(f) if e["event"] == "round"][-1] for f in (near, far))
    assert far_loss == pytest.approx(near_loss, abs=1e-3)
    assert json.loads((far / "spent.json").read_text())["calls"] > 4
    assert "key" not in (far / "recipe.toml").read_text()


def test_a_silo_whose_model_does_not_answer_sits_out_and_a_run_that_nobody_answers_goes_on_later(
    place, tmp_path, monkeypatch
):
    monkeypatch.setattr(endpoint, "FIRST_WAIT", 0.001)
    broken = threading.Event()

    class Flaky:
        def __init__(self, app):
            self.app = app

        async def __call__(self, scope, receive, send):
            if scope["type"] == "http" and scope["method"] == "POST" and broken.is_set():
                await send({"type": "http.response.start", "status": 503, "headers": []})
                await send({"type": "http.response.body", "body": b"down"})
                return
            await self.app(scope, receive, send)

    with served(Flaky(tiny_app())) as url:
        recipe = recipe_for(place, "exemplars", **at_endpoint(url, parallel=1, batch=64))
        straight = run(recipe, tmp_path / "straight")
        broken.set()
        with pytest.raises(FedllmError, match="cannot be used"):
            run(recipe, tmp_path / "never")
        assert not (tmp_path / "never").exists()
        broken.clear()

        held = endpoint.Endpoint.score
        calls = []

        def failing(self, pairs):
            calls.append(1)
            if len(calls) in (3, 7, 8):
                raise endpoint.Unanswered("it was away")
            return held(self, pairs)

        # Two for the base; then in round 1 `a` fails, and in round 2 both.
        monkeypatch.setattr(endpoint.Endpoint, "score", failing)
        with pytest.raises(FedllmError, match="a: its model did not answer: it was away; b:"):
            run(recipe, tmp_path / "stopped")
        event = read_events(tmp_path / "stopped")[-1]
        assert event["dropped"] == {"a": "its model did not answer: it was away"}
        assert event["clients"] == 1
        monkeypatch.setattr(endpoint.Endpoint, "score", held)
        resume(tmp_path / "stopped")
    assert [e["round"] for e in read_events(tmp_path / "stopped") if e["event"] == "round"] == [1, 2]
    assert len([e for e in read_events(straight) if e["event"] == "round"]) == 2


class Stopping(Ui):
    """Stops after so many ticks, as Ctrl-C would."""

    def __init__(self, ticks):
        super().__init__(None)
        self.left = ticks

    def tick(self, tokens):
        self.left -= 1
        if not self.left:
            raise Interrupted
        super().tick(tokens)


@pytest.mark.parametrize("name", METHODS)
def test_a_stopped_run_goes_on_to_the_same_bits(place, here, name, tmp_path):
    whole = Stopping(10**6)
    run(recipe_for(place, name), tmp_path / "whole", ui=whole)
    with pytest.raises(Interrupted):
        run(recipe_for(place, name), tmp_path / "stopped", ui=Stopping((10**6 - whole.left) * 2 // 3))
    resume(tmp_path / "stopped")
    assert same(params(here[name]), params(tmp_path / "stopped"))


def test_at_sites_the_same_is_learned_and_what_was_found_in_texts_is_logged(place, here, tmp_path):
    recipe = recipe_for(place, "templates")
    sites = [
        make_site(
            tmp_path / name,
            name,
            f'train = "{place / name}.jsonl"' + (f'\ntemplates = "{place / "own.txt"}"' if name == "a" else ""),
            str(place / "model"),
        )
        for name in "ab"
    ]
    far = tmp_path / "far"
    far.mkdir()
    (far / "recipe.toml").write_text(write_recipe(recipe.model_copy(update={"silos": {}})))
    (far / "run.json").write_text(json.dumps({"wanted": "run", "user": "admin@example.org"}))
    with desks(sites) as open_desks:
        lead(far, line_to(open_desks), ["a", "b"])
    # A site may reckon with other threads.
    assert same(params(here["templates"]), params(far), within=1e-5)
    lines = [json.loads(line) for line in (tmp_path / "a" / "state" / "audit.jsonl").read_text().splitlines()]
    told = [line for line in lines if line["what"] == "reply" and line["op"] == "train"]
    assert [line.get("copied") for line in told] == [None, 1]
    library = json.loads((far / "prompt" / "prompt.json").read_text())["library"]
    assert not any("the cat a 1" in each["template"] for each in library)


def test_no_site_sends_its_text_to_an_api_that_it_did_not_name(place, tmp_path):
    recipe = recipe_for(place, "templates", **at_endpoint("https://elsewhere.example/v1"))
    site = make_site(tmp_path / "a", "a", f'train = "{place / "a"}.jsonl"', "endpoint")
    far = tmp_path / "far"
    far.mkdir()
    (far / "recipe.toml").write_text(write_recipe(recipe.model_copy(update={"silos": {}})))
    (far / "run.json").write_text(json.dumps({"wanted": "run", "user": "admin@example.org"}))
    with desks([site]) as open_desks, pytest.raises(FedllmError, match="sends its text to no API"):
        lead(far, line_to(open_desks), ["a"])


@pytest.mark.parametrize(
    ("name", "changes", "says"),
    [
        ("exemplars", {"model": "endpoint"}, "no .endpoint. says where"),
        ("exemplars", {"endpoint": {"url": "http://x/v1", "model": "m"}}, "set model = "),
        ("exemplars", {"algorithm": {"name": "averaging"}, **at_endpoint("http://x/v1")}, "needs the model's weights"),
        ("exemplars", {"evaluate": {"pooled": True}, **at_endpoint("http://x/v1")}, "need a model that is here"),
        ("exemplars", {"task": {"name": "causal"}}, "asks questions"),
        ("exemplars", {"task": {"name": "classify"}}, "which answers there are"),
        ("exemplars", {"algorithm": {"name": "exemplars", "shots": 0}}, "shots is 0"),
        ("templates", {"algorithm": {"name": "templates", "library": ["no place"]}}, "has not {text} once"),
        ("templates", {"algorithm": {"name": "templates", "epsilon": 0.0}}, "above 0"),
        ("fed_sp_sc", {"algorithm": {"name": "fed_sp_sc", "epsilon": 1.0}}, "known beforehand"),
        ("fed_dp_cot", {"algorithm": {"name": "fed_dp_cot", "public": "public.jsonl", "batch": 9}}, "has 4 questions"),
        ("fed_dp_cot", {"transforms": [{"name": "cast"}]}, "take"),
        ("text_prompt", {"task": {"name": "instruct"}, "silos": {"a": "sums_a.jsonl"}}, "needs task.words"),
        (
            "text_prompt",
            {
                "task": {"name": "instruct"},
                "silos": {"a": "sums_a.jsonl"},
                "algorithm": {**METHODS["text_prompt"], "name": "text_prompt", "score": "loss"},
            },
            "reads wrong answers",
        ),
        (
            "text_prompt",
            {
                "algorithm": {**METHODS["text_prompt"], "name": "text_prompt", "tokens": 1000},
                **at_endpoint("http://x/v1"),
            },
            "set endpoint.tokens",
        ),
    ],
)
def test_what_does_not_fit_is_said_at_plan_time(place, name, changes, says):
    with pytest.raises(FedllmError, match=says):
        build(recipe_for(place, name, **changes), weights=False)


def test_the_plan_says_what_leaves_and_what_votes_cost(place):
    changes = {"algorithm": {**METHODS["templates"], "name": "templates", "epsilon": 0.5}}
    lines = "\n".join(plan_lines(build(recipe_for(place, "templates", **changes), weights=False)))
    assert "epsilon 1 for a silo's votes of 2 rounds" in lines
    assert "copies of 4 words in a row" in lines
    assert "nothing inside the model" in lines
    away = recipe_for(place, "templates", **at_endpoint("http://nobody.example/v1"))
    assert "templates" in "\n".join(plan_lines(build(away, weights=False)))
