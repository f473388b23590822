"""A search that was killed goes on as the search that was not: same prompt, same spending, same bits."""

from __future__ import annotations

import json
import shutil

import pytest
from safetensors import deserialize

import fedllm
from fedllm.runtime.store import read_events
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("cma")

SEARCHES = {
    "black_box": {"dim": 5, "population": 6, "examples": 3},
    "fedbpt": {"dim": 5, "population": 6, "generations": 2, "examples": 3},
    "text_prompt": {"prompt": "Say it. Be kind.", "calls": 130, "candidates": 5, "keep": 2, "examples": 3},
}


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("search")
    tiny_model(len(tiny_tokenizer())).save_pretrained(folder / "model")
    tiny_tokenizer().save_pretrained(folder / "model")
    for name in "abc":
        rows = [{"text": f"{name} sat {i}", "label": ("good", "bad")[i % 2]} for i in range(12)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def recipe(place, name):
    return {
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "rounds": 4,
        "silos": {name: f"{name}.jsonl" for name in "abc"},
        "data": {"root": str(place), "limit_test": 2},
        "task": {"name": "classify", "words": {"good": "positive", "bad": "negative"}, "max_tokens": 64},
        "algorithm": {"name": name, **SEARCHES[name]},
        "trainable": {"name": "none"} if name == "text_prompt" else {"name": "prompt", "tokens": 3},
    }


def told(folder):
    events = [{key: value for key, value in event.items() if key != "seconds"} for event in read_events(folder)]
    return [event for event in events if event["event"] in ("round", "alone")]


def result(folder):
    made = folder / "prompt" / "prompt.json"
    return made.read_bytes() if made.exists() else (folder / "adapter" / "adapter_model.safetensors").read_bytes()


@pytest.mark.parametrize("name", SEARCHES)
def test_killed_between_its_line_and_its_checkpoint_it_ends_with_the_same_bits(name, place, tmp_path):
    straight = fedllm.run(recipe(place, name), tmp_path / "straight")
    killed = tmp_path / "killed"
    shutil.copytree(straight, killed)
    # What a kill leaves that comes after the last round's line and before its checkpoint.
    (killed / "checkpoints" / "round-000004.safetensors").unlink()
    lines = (killed / "events.jsonl").read_text().splitlines(keepends=True)
    last = next(at for at, line in enumerate(lines) if json.loads(line).get("round") == 4)
    (killed / "events.jsonl").write_text("".join(lines[: last + 1]))
    for made in ("adapter", "prompt", "metrics.json", "report.html"):
        shutil.rmtree(killed / made, ignore_errors=True)
    fedllm.resume(killed)
    assert told(killed) == told(straight) and len(told(straight)) == 7
    assert result(killed) == result(straight)
    ends = [
        dict(deserialize((run / "checkpoints" / "round-000004.safetensors").read_bytes())) for run in (straight, killed)
    ]
    assert ends[0] == ends[1]
    search = json.loads((killed / "metrics.json").read_text())["search"]
    if name == "text_prompt":
        # A round takes 45 calls: 45, 45, and of the 40 left two examples' worth, 30; the fourth asks nobody.
        assert [round["calls_spent"] for round in told(straight)[:4]] == [45, 90, 120, 120]
        assert search["calls_left"] == 10 and told(straight)[3]["clients"] == 0
