"""Two processes that share one model and train it together: the same as one, over rounds, and gone afterwards."""

from __future__ import annotations

from contextlib import suppress

import psutil
import pytest
import torch
from safetensors.torch import load_file

import fedllm
from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.progress import Ui
from fedllm.core.errors import FedllmError, Interrupted
from fedllm.core.types import Request
from fedllm.runtime.store import load_checkpoint, read_events
from tests.tiny import write_model, write_rows


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("processes")
    write_model(place / "model")
    for name in "ab":
        rows = [{"text": f"{name} {i}: " + "the cat sat on the mat " * (1 + i % 3)} for i in range(12)]
        write_rows(place / f"{name}.jsonl", rows)
    return place


def recipe(place, **changes):
    table = {
        "model": str(place / "model"),
        "rounds": 2,
        "threads": 2,
        "device": "cpu",
        "dtype": "float32",
        "runtime": "local",
        "silos": {name: str(place / f"{name}.jsonl") for name in "ab"},
        "task": {"name": "causal", "block": 24},
        "trainable": "full",
        # Three rows by two processes, two at a time: one of them has a row that does not count.
        "client": {
            "steps": 3,
            "batch_size": 5,
            "micro_batch": 2,
            "keep_optimiser": True,
            "weight": "tokens",
            "max_grad_norm": 0.5,
            "proximal": 0.1,
        },
        "evaluate": {"alone": False},
        "gradient_checkpointing": True,
    }
    return read_recipe(table | changes)


def furthest(one, other):
    assert one.keys() == other.keys()
    return max(float((one[name].float() - other[name].float()).abs().max()) for name in one)


def children():
    found = []
    for each in psutil.Process().children(recursive=True):
        # One that has just been killed has no command line any more.
        with suppress(psutil.Error):
            found += [each] if "fedllm.app.rank" in each.cmdline() else []
    return found


def kill_one(tokens):
    for each in children()[1:]:
        each.kill()


@pytest.mark.parametrize("optimiser", ["adamw", "muon"])
def test_a_run_with_two_processes_is_that_with_one(place, tmp_path, optimiser):
    client = {**recipe(place).client, "optimiser": optimiser}
    one = fedllm.run(recipe(place, client=client), tmp_path / "one")

    class Stop(Ui):
        steps = 0

        def tick(self, tokens):
            Stop.steps += 1
            if Stop.steps == 8:
                assert len(children()) == 2
                raise Interrupted
            super().tick(tokens)

    # Stopped in its second round and resumed: what the optimiser knew is put together and taken apart again.
    with pytest.raises(Interrupted):
        fedllm.run(recipe(place, client=client, processes=2), tmp_path / "two", ui=Stop(None))
    assert not children()
    two = fedllm.resume(tmp_path / "two")
    assert not children()
    models = [load_file(run / "model" / "model.safetensors") for run in (one, two)]
    moved = furthest(models[0], load_file(place / "model" / "model.safetensors"))
    assert furthest(*models) < 1e-3 * moved
    memories = [load_checkpoint(run).memory for run in (one, two)]
    for name in "ab":
        assert memories[0][name]["work/exp_avg/model.norm.weight"].abs().max() > 0
        assert furthest(memories[0][name], memories[1][name]) < 1e-4
    for left, right in zip(read_events(one), read_events(two), strict=True):
        if left["event"] == "round":
            assert left["tokens"] == right["tokens"]
            # A loss that differs in its last digit may be written with one digit less.
            assert left["bytes_up"] == pytest.approx(right["bytes_up"], abs=32)
            assert left["train_loss"] == pytest.approx(right["train_loss"], rel=1e-5)
            assert left["loss"] == pytest.approx(right["loss"], rel=1e-5)


@pytest.mark.parametrize("trainable", ["lora", pytest.param("full", marks=pytest.mark.slow)])
def test_in_bfloat16_they_are_as_near_as_the_type_allows_and_one_that_ends_is_one_sentence(place, trainable):
    replies = []
    for count in (1, 2):
        parts = build(recipe(place, dtype="bfloat16", processes=count, trainable=trainable))
        request = Request("a", 1, "train", parts.params, {"slow": 1.5})
        replies.append(parts.algorithm.client(request, parts.open_silo(lambda tokens: None)("a")))
    (one, kept), (two, also) = replies
    assert one.weight == two.weight and one.scalars["tokens"] == two.scalars["tokens"]
    assert one.scalars["train_loss"] == pytest.approx(two.scalars["train_loss"], rel=1e-2)
    assert {name: value.dtype for name, value in one.tensors.items()} == {n: v.dtype for n, v in two.tensors.items()}
    assert list(one.tensors) == list(two.tensors) and kept.keys() == also.keys()
    flat = [torch.cat([value.flatten() for value in reply.tensors.values()]) for reply in (one, two)]
    assert float(torch.cosine_similarity(*flat, dim=0)) > 0.98

    silo = parts.open_silo(kill_one)("a")
    with pytest.raises(FedllmError, match=r"that train together has ended \(SIGKILL: "):
        parts.algorithm.client(request, silo)
    assert not children()


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"processes": 6}, "client.batch_size 5"),
        ({"processes": 2, "runtime": "cohort", "trainable": "lora"}, "runtime is 'cohort'"),
        ({"processes": 0}, "'processes' is 0"),
    ],
)
def test_what_several_processes_cannot_do_is_refused(place, changes, sentence):
    with pytest.raises(FedllmError, match=sentence):
        build(recipe(place, **changes), weights=False)
