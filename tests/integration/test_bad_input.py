"""What cannot train is one sentence with the remedy, before anything is trained and before there is a folder."""

from __future__ import annotations

import json
import shutil

import pytest

import fedllm
from fedllm.app.config import read_recipe, read_toml, write_recipe
from fedllm.core.errors import FedllmError
from fedllm.runtime.store import read_events
from tests.tiny import tiny_model, tiny_tokenizer


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("bad")
    models = {"model": {}, "shallow": {"layers": 1}, "thin": {"hidden": 16}, "few": {"vocab": 280}}
    for name, size in models.items():
        tiny_model(**size).save_pretrained(place / name)
        tiny_tokenizer().save_pretrained(place / name)
    (place / "good.jsonl").write_text(
        "".join(json.dumps({"text": f"{i} the cat sat on the mat and the answer is"}) + "\n" for i in range(12))
    )
    (place / "empty.jsonl").write_text("")
    (place / "blank.jsonl").write_text("".join(json.dumps({"text": "", "id": i}) + "\n" for i in range(12)))
    return place


def recipe(place, **changes):
    table = {
        "model": str(place / "model"),
        "rounds": 2,
        "threads": 1,
        "dtype": "float32",
        "silos": {name: str(place / "good.jsonl") for name in "ab"},
        "task": {"name": "causal", "block": 16},
        "trainable": "full",
        "client": {"steps": 1, "batch_size": 2},
        "optimiser": {"name": "nesterov", "learning_rate": 0.7},
        "evaluate": {"alone": False},
    }
    return read_recipe(table | changes)


BAD = {
    "an empty shard": ({"silos": {"a": "good.jsonl", "b": "empty.jsonl"}}, r"empty\.jsonl has no rows; give"),
    "an empty archive": ({"silos": {}, "partition": {"name": "iid", "silos": 2, "source": "empty.jsonl"}}, "no rows"),
    "more silos than rows": (
        {"silos": {}, "partition": {"name": "iid", "silos": 99, "source": "good.jsonl"}},
        "give 1 to",
    ),
    "a shard of blanks": (
        {"silos": {"a": "blank.jsonl"}},
        r"silos\.a: 12 rows with fewer than two different ones|The silo 'a' has no usable",
    ),
    "no steps": ({"client": {"steps": 0}}, r"client\.steps is 0; it must be above 0"),
    "no epochs": ({"client": {"epochs": 0}}, r"client\.epochs is 0\.0; it must be above 0"),
    "an unvisited layer": (
        {"share": {"name": "fragments", "layers": [[0]]}},
        r"share never visits layer 1; add it to one of the lists in share\.layers",
    ),
    "too few rounds to visit all": ({"share": {"name": "fragments", "count": 3}}, r"set rounds to at least that"),
    "more fragments than layers": ({"share": {"name": "fragments", "count": 3}, "rounds": 9}, r"share\.count is 3 but"),
    "a tokenizer of another model": ({"model": "few"}, r"makes 307 tokens and its model knows 280; put the tokenizer"),
    "blocks that the model cannot see": (
        {"task": {"name": "causal", "block": 4096}},
        r"block is 4096, but the model sees",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_it_is_one_sentence_and_no_folder(place, tmp_path, what):
    changes, sentence = BAD[what]
    changes = {**changes, "data": {"root": str(place)}}
    if "model" in changes:
        changes["model"] = str(place / changes["model"])
    with pytest.raises(FedllmError, match=sentence):
        fedllm.run(recipe(place, **changes), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def run(place):
    return fedllm.run(recipe(place), place / "run")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"model": "shallow"}, r"of another model or trainable .* 'model\.layers\.1\..*put the recipe back"),
        ({"model": "thin"}, r"of another model or trainable"),
        ({"trainable": {"name": "lora"}}, r"of another model or trainable"),
        ({"optimiser": {"name": "fedadam"}}, r"of another optimiser"),
        ({"optimiser": {"name": "fedavg"}}, r"of another optimiser"),
    ],
    ids=str,
)
def test_a_checkpoint_of_another_run_is_refused(place, run, tmp_path, changes, sentence):
    folder = tmp_path / "other"
    shutil.copytree(run, folder)
    if "model" in changes:
        changes = {"model": str(place / changes["model"])}
    said = read_recipe({**read_toml(folder / "recipe.toml"), "rounds": 3, **changes})
    (folder / "recipe.toml").write_text(write_recipe(said))
    before = read_events(folder)
    with pytest.raises(FedllmError, match=sentence):
        fedllm.resume(folder)
    assert read_events(folder) == before
