"""Gradient checkpointing saves memory and changes no number."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.types import Request, Silo
from fedllm.silo.examples import Example
from fedllm.silo.models import load_model
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import full, lora, parameters
from fedllm.silo.training import local_training
from tests.tiny import tiny_model

ROWS = [Example([5 + i, 9, 40 + i, 7, 8, 30], [-100, 9, 40 + i, 7, 8, 30]) for i in range(8)]


@pytest.mark.parametrize("trainable", [lora(r=2), full()], ids=["lora", "full"])
def test_updates_with_checkpointing_are_those_without(trainable, tmp_path):
    tiny_model().save_pretrained(tmp_path)
    work = local_training(causal_loss(), 0, steps=2, batch_size=4, optimiser="sgd", learning_rate=0.1)
    updates = []
    for checkpointing in (False, True):
        model = trainable.attach(load_model(str(tmp_path), checkpointing=checkpointing), 0)
        silo = Silo("a", model, {"train": ROWS, "test": []}, {}, 0)
        updates.append(work.client(Request("a", 0, "train", parameters(model)), silo)[0].tensors)
    plain, checkpointed = updates
    for name, value in plain.items():
        torch.testing.assert_close(value, checkpointed[name], rtol=1e-5, atol=1e-7)
    assert any(bool(value.any()) for value in plain.values())
