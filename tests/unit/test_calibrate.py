"""Updates of a recorded length: FedEraser's equation 4 by hand, and who is not asked."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Facts, Reply, Request
from fedllm.exchange.calibrate import calibrate, norm, record_norms


def exchange(requests):
    values = {"a": [3.0, 4.0], "b": [0.0, 0.5], "c": [0.0, 0.0], "d": [math.nan, 1.0]}
    for each in requests:
        yield Reply(each.client, each.round, {"x": torch.tensor(values[each.client])}, 1.0, {"train_loss": 2.0})


def requests(names, number=1):
    return [Request(name, number, "train", {}) for name in names]


def test_an_update_keeps_its_direction_and_has_the_recorded_length():
    layer = calibrate({"a": [0.0, 10.0], "b": [7.0, 0.0], "c": [1.0, 1.0], "d": [1.0, 1.0]})
    found = {reply.client: reply for reply in layer.exchange(exchange)(requests("abcd"))}
    assert found["a"].tensors["x"].tolist() == [6.0, 8.0] and found["a"].weight == 1.0
    # Nothing was recorded of b in that round, so it is not asked; e is not known at all.
    assert set(found) == {"a", "c", "d"} and "no update" in layer.lost(1, "b") and layer.lost(0, "b") is None
    assert layer.lost(1, "e") and layer.lost(9, "a")
    assert found["c"].tensors["x"].tolist() == [0.0, 0.0] and found["d"].tensors["x"][0].isnan()


def test_norms_are_measured_by_the_server():
    found = {reply.client: reply.scalars for reply in record_norms().exchange(exchange)(requests("abd"))}
    assert found["a"] == {"train_loss": 2.0, "norm": 5.0} and found["b"]["norm"] == 0.5 and "norm" not in found["d"]
    assert norm({"a": torch.tensor([1.0, 2.0]), "b": torch.tensor([[2.0]])}) == 3.0


def test_behind_a_sum_there_is_nothing_to_record_or_to_scale():
    for layer in (record_norms(), calibrate({})):
        assert layer.claim(Facts()) == Facts()
        with pytest.raises(FedllmError, match="behind a sum the server sees none"):
            layer.claim(Facts(sees="sum"))
