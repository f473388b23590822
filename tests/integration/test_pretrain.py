"""Pre-training from nothing by a recipe: tokenizer, model, cleaning, network; and the same after a stop."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fedllm
from fedllm.app.config import read_recipe
from fedllm.app.progress import Ui
from fedllm.core.errors import FedllmError, Interrupted

TEXT = "the union of these states is a more perfect one than the peace and the laws of the land have made it"
WORDS = TEXT.split()


def recipe(folder, **changes):
    for place, name in enumerate(("old", "new")):
        rows = [
            {"text": " ".join(WORDS[(i * 7 + j * (place + 3)) % len(WORDS)] for j in range(40)) + f" in {1800 + i}."}
            for i in range(30)
        ]
        rows += rows[:3]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = {
        "rounds": 3,
        "dtype": "float32",
        "threads": 1,
        "scratch": {"depth": 1, "context": 32, "vocab": 320},
        "silos": {name: str(folder / f"{name}.jsonl") for name in ("old", "new")},
        "cleaning": [{"name": "exact_duplicates"}],
        "task": {"name": "causal", "block": 16},
        "trainable": "full",
        "client": {
            "steps": 4,
            "batch_size": 4,
            "learning_rate": 1e-2,
            "keep_optimiser": True,
            "schedule": "cosine",
            "warmup": 0.2,
            "weight": "tokens",
        },
        "optimiser": {"name": "nesterov", "learning_rate": 1.0, "momentum": 0.5},
        "transforms": [{"name": "quantise", "bits": 4}],
        "evaluate": {"alone": False, "pooled": "data_parallel"},
        "links": {"default": {"mbit": 10, "ms": 50}, "silos": {"old": {"mbit": 1}}},
    }
    return read_recipe(table | changes)


def test_a_model_from_nothing_learns_and_is_an_ordinary_folder(tmp_path):
    run = fedllm.run(recipe(tmp_path), tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    for name in ("old", "new"):
        assert metrics["loss"]["federated"][name] < metrics["loss"]["base"][name] - 0.5
        assert name in metrics["loss"]["pooled"]
    assert metrics["scratch"]["tokens_per_byte"] < 0.7
    assert metrics["data_parallel_seconds"] > metrics["simulated_seconds"] > 0
    start = json.loads((run / "events.jsonl").read_text().splitlines()[1])
    assert start["cleaned"]["old"]["kept"] == 30
    assert sum(count for what, count in start["cleaned"]["old"].items() if "exact" in what) == 3
    model, tokenizer = AutoModelForCausalLM.from_pretrained(run / "model"), AutoTokenizer.from_pretrained(run / "model")
    ids = tokenizer("the union of", return_tensors="pt")
    assert model.generate(**ids, max_new_tokens=4, do_sample=False).shape[1] == ids["input_ids"].shape[1] + 4
    assert model.config.vocab_size == len(tokenizer)
    assert "data-parallel" in (run / "report.html").read_text()


def test_with_kept_moments_momentum_and_error_feedback_a_resumed_run_is_the_straight_one(tmp_path):
    straight = fedllm.run(recipe(tmp_path), tmp_path / "straight")

    class Stop(Ui):
        steps = 0

        def tick(self, tokens):
            Stop.steps += 1
            if Stop.steps == 21:
                raise Interrupted
            super().tick(tokens)

    with pytest.raises(Interrupted):
        fedllm.run(recipe(tmp_path), tmp_path / "stopped", ui=Stop(None))
    resumed = fedllm.resume(tmp_path / "stopped")
    one, other = (load_file(each / "model" / "model.safetensors") for each in (straight, resumed))
    assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"trainable": "lora"}, "trainable"),
        ({"task": {"name": "causal", "block": 64}}, "scratch.context"),
        ({"links": {"silos": {"odl": {"mbit": 1}}}}, "odl"),
        ({"cleaning": [{"name": "exact_duplicate"}]}, "exact_duplicates"),
        ({"scratch": {"config": "/no/such/folder", "vocab": 320}}, "scratch.config"),
        ({"share": {"name": "fragments", "count": 3}}, "share.count"),
    ],
)
def test_what_does_not_fit_is_one_sentence_before_anything_is_trained(tmp_path, changes, sentence):
    with pytest.raises(FedllmError, match=sentence):
        fedllm.run(recipe(tmp_path, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()
