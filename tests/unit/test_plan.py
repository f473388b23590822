"""The plan: steps in order, what is known after each, and what a client costs; nothing runs."""

from __future__ import annotations

import pytest
import torch

from fedllm.app import lean, plan_view
from fedllm.app.build import build as parts_of_run
from fedllm.app.config import read_recipe
from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.plan import plan
from fedllm.core.round import averaging
from fedllm.core.types import Middleware, Work
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.lora_error import lora_error
from fedllm.exchange.top_k import top_k
from fedllm.silo.trainables import parameters
from tests.tiny import write_model


def never(*args):
    raise AssertionError("a plan runs nothing")


PARAMS = {"x": torch.empty(10, 10, device="meta"), "y": torch.empty(7, device="meta")}


def build(**parts):
    return averaging(work=Work(never), select=never, aggregate=mean(), **parts)


def test_the_steps_are_in_the_order_in_which_they_happen():
    summing = Middleware("secure sum", lambda exchange: exchange)
    steps = plan(build(transforms=[clip(1.0), cast()], middleware=[summing]), PARAMS).steps
    assert [(step.where, step.name) for step in steps] == [
        ("server", "select and share"),
        ("silo", "local training"),
        ("silo", "encode: clip"),
        ("silo", "encode: cast to bfloat16"),
        ("wire", "secure sum"),
        ("server", "decode: cast to bfloat16"),
        ("server", "decode: clip"),
        ("server", "aggregate: mean by examples"),
        ("server", "step: FedAvg(lr 1)"),
    ]


def test_the_bound_is_known_from_the_clip_on():
    steps = plan(build(transforms=[clip(0.5)]), PARAMS).steps
    assert [step.facts.norm_bound for step in steps] == [None, None, 0.5, 0.5, 0.5, 0.5]


def test_bytes_by_hand():
    # 107 float32 values each way; as bfloat16 half; of top 10 %: 10 + 1 values of 4 bytes with 4-byte positions.
    assert plan(build(), PARAMS)[1:] == (107, 428, 428)
    assert plan(build(transforms=[cast()]), PARAMS)[1:] == (107, 428, 214)
    assert plan(build(transforms=[top_k(0.1)]), PARAMS)[1:] == (107, 428, 88)
    assert plan(build(transforms=[top_k(0.1), cast()]), PARAMS)[1:] == (107, 428, 66)


def test_a_part_that_needs_each_update_is_refused_behind_a_sum():
    summing = Middleware("secure sum", lambda exchange: exchange, claim=lambda facts: facts._replace(sees="sum"))
    with pytest.raises(FedllmError, match="drop the probe"):
        plan(build(middleware=[summing], probes=[lora_error()]), PARAMS)


def test_of_replies_in_files_the_server_holds_the_mean_of_one_tensor_and_of_the_first_parameters_nothing(
    tmp_path, monkeypatch
):
    write_model(tmp_path / "model")
    table = {"model": str(tmp_path / "model"), "rounds": 1, "trainable": {"name": "full"}, "task": {"name": "causal"}}

    def held(**more):
        return plan_view.server(parts_of_run(read_recipe({**table, **more}), weights=False, elsewhere=["a", "b"]))

    clip = {"transforms": [{"name": "clip", "max_norm": 1.0}]}
    small, clipped = held(), held(**clip)
    monkeypatch.setattr(plan_view, "LARGE", 0)
    sizes = [value.numel() for value in parameters(parts_of_run(read_recipe(table), False, ["a"]).model).values()]
    # The exact sum's 16 bytes a value, and an update's 4.
    assert small - held() == 20 * sum(sizes) - 4 * max(sizes)
    # A clip looks at all of an update at once.
    assert held(**clip) == clipped
    with_first = held()
    monkeypatch.setattr(lean, "LARGE", 0)
    assert with_first - held() == 4 * sum(sizes)
