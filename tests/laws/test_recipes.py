"""Every recipe that the project brings parses, plans, and runs two rounds on a tiny model."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import fedllm
from fedllm.app.build import build
from fedllm.app.config import read_recipe, read_toml
from fedllm.app.plan_view import plan_lines
from tests.tiny import tiny_model, tiny_tokenizer, write_rows

ROOT = Path(__file__).resolve().parents[2]
RECIPES = [*sorted((ROOT / "recipes").glob("*.toml")), ROOT / "fedllm" / "app" / "quickstart.toml"]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    return folder


def tiny_recipe(path: Path, model: Path, folder: Path):
    """The recipe as it stands, but for the model, the text, and how long it takes."""
    table = read_toml(path)
    names = list(table.get("silos", {})) or ["hospital_a", "hospital_b"]
    for name in names:
        rows = [{"prompt": f"what is {name} {i}", "response": f"it is number {i}"} for i in range(12)]
        rows = [{**row, "text": f"{row['prompt']}? {row['response']}."} for row in rows]
        labels = list(table["task"].get("words", ["positive", "negative"]))
        rows = [{**row, "label": labels[i % len(labels)], "answer": f"{i}"} for i, row in enumerate(rows)]
        write_rows(folder / f"{name}.jsonl", rows)
    table["silos"] = {name: f"{name}.jsonl" for name in names}
    table.pop("partition", None)
    if "scratch" in table:
        table["scratch"] = {"depth": 1, "context": 32, "vocab": 300}
    if table["task"]["name"] == "causal":
        table["task"]["block"] = 16
    table["data"] = {**table.get("data", {}), "root": str(folder), "limit_test": 4}
    table |= {"model": str(model), "rounds": 2, "dtype": "float32", "device": "cpu"}
    if "general" in table.get("evaluate", {}):
        (folder / "general.jsonl").write_text(json.dumps({"text": "The cat sat on the mat, and the dog did not."}))
        table["evaluate"] = {**table["evaluate"], "general": "general.jsonl"}
    algorithm = table.get("algorithm", {})
    if "client" in table:
        table["client"] = {**table["client"], "steps": 1, "batch_size": 2}
    if algorithm.get("name") in ("black_box", "fedbpt", "text_prompt"):
        algorithm["examples"] = 2
    algorithm |= {key: f"{names[0]}.jsonl" for key in {"pool", "public"} & algorithm.keys()}
    algorithm |= {key: 2 for key in {"tokens", "batch", "samples"} & algorithm.keys()}
    return read_recipe(table)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_the_recipe_plans_and_runs_two_rounds(path, model, tmp_path):
    if path.stem == "homomorphic":
        pytest.importorskip("tenseal", reason="the recipe needs tenseal: pip install 'fedllm[homomorphic]'")
    recipe = tiny_recipe(path, model, tmp_path)
    if recipe.scratch is None:
        assert any("server" in line for line in plan_lines(build(recipe, weights=False)))
    run = fedllm.run(recipe, tmp_path / "run")
    metrics = json.loads((run / "metrics.json").read_text())
    assert metrics["rounds"] == 2
    if recipe.secure:
        assert metrics["losses_kept"] and not metrics["loss"]
    else:
        assert set((metrics["loss"] or metrics["accuracy"])["federated"]) == set(recipe.silos)
    if recipe.evaluate.general:
        assert set(metrics["general"]) >= {"base", "federated"}
    result = (
        ("adapter", "adapter_model.safetensors")
        if recipe.trainable["name"] != "full"
        else ("model", "model.safetensors")
    )
    if recipe.algorithm["name"] not in ("averaging", "black_box", "fedbpt"):
        result = ("prompt", "prompt.json")
    assert run.joinpath(*result).exists()
    assert (run / "report.html").stat().st_size > 10_000
