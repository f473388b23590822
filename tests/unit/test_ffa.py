"""LoRA with A frozen: what leaves is B alone, and its mean is the mean of the products."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.types import Request, Silo
from fedllm.silo.examples import Example
from fedllm.silo.ffa import ffa_lora
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import lora, parameters, trained
from fedllm.silo.training import local_training
from tests.tiny import tiny_model


def factors(model):
    """Each layer's A, by its name up to it."""
    return {name.partition(".lora_A.")[0]: value for name, value in model.named_parameters() if ".lora_A." in name}


@pytest.fixture(scope="module")
def model():
    return ffa_lora(2).attach(tiny_model(), 0)


def silo(name, model):
    rows = torch.randint(3, 307, (4, 9), generator=torch.Generator().manual_seed(ord(name))).tolist()
    return Silo(name, model, {"train": [Example(row, row) for row in rows], "test": []}, {}, ord(name))


def test_only_b_is_learned_and_a_is_the_one_that_everybody_draws(model):
    assert all(".lora_B." in name for name in trained(model))
    whole = lora(2).attach(tiny_model(), 0)
    assert len(trained(model)) * 2 == len(trained(whole))
    same = factors(whole)
    assert all(torch.equal(value, same[name]) and bool(value.any()) for name, value in factors(model).items())
    other = factors(ffa_lora(2).attach(tiny_model(), 1))
    assert not any(torch.equal(value, other[name]) for name, value in factors(model).items())


def test_the_mean_of_b_is_the_mean_of_the_products(model):
    work = local_training(causal_loss(), 0, steps=2, batch_size=2, learning_rate=1e-2)
    start, before = parameters(model), {name: value.clone() for name, value in factors(model).items()}
    ends = [work.client(Request(name, 0, "train", start), silo(name, model))[0].tensors for name in "ab"]
    assert all(torch.equal(value, before[name]) for name, value in factors(model).items())
    for name in start:
        a, (one, other) = factors(model)[name.partition(".lora_B.")[0]], [end[name] for end in ends]
        assert not torch.equal(one, other)
        torch.testing.assert_close((one + other) / 2 @ a, (one @ a + other @ a) / 2, rtol=0, atol=1e-7)


@pytest.mark.parametrize("settings", [{"optimiser": "sgd", "learning_rate": 0.1}, {"learning_rate": 1e-3}], ids=str)
def test_a_cohort_equals_its_clients_one_by_one(model, settings):
    work = local_training(causal_loss(), 0, steps=2, batch_size=2, **settings)
    draw = torch.Generator().manual_seed(0)
    starts = [{n: v + 0.1 * torch.randn(v.shape, generator=draw) for n, v in parameters(model).items()} for _ in "abc"]
    members = [(Request(n, 0, "train", start), silo(n, model)) for n, start in zip("abc", starts, strict=True)]
    alone, together = [work.client(*member)[0] for member in members], [reply for reply, _ in work.cohort(members)]
    for one, other in zip(alone, together, strict=True):
        assert one.tensors.keys() == other.tensors.keys() == starts[0].keys()
        assert all(torch.allclose(one.tensors[name], other.tensors[name], rtol=0, atol=1e-5) for name in starts[0])
