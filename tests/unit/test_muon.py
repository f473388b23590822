"""Muon: against the iteration on singular values, against torch's own, and which weights it steps."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaForCausalLM

from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.plan_view import remembered
from fedllm.core.errors import FedllmError
from fedllm.core.plan import size
from fedllm.core.types import Request, Silo
from fedllm.silo.examples import Example
from fedllm.silo.muon import LENGTH, Muon, inner_matrices, orthogonal
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import full, trained
from fedllm.silo.training import local_training
from tests.tiny import tiny_model, write_model, write_rows


@pytest.fixture(scope="module")
def recipe(tmp_path_factory):
    place = tmp_path_factory.mktemp("muon")
    write_model(place / "model")
    write_rows(place / "a.jsonl", [{"text": f"{number}: the cat sat on the mat"} for number in range(12)])
    return {
        "model": str(place / "model"),
        "rounds": 1,
        "device": "cpu",
        "dtype": "float32",
        "silos": {"a": str(place / "a.jsonl")},
        "task": {"name": "causal", "block": 24},
        "client": {"steps": 2, "batch_size": 2, "optimiser": "muon", "keep_optimiser": True},
    }


SETTINGS = {"lr": 0.02, "betas": (0.9, 0.99), "weight_decay": 0.1, "fused": True}


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def by_hand(value):
    for _ in range(5):
        value = 3.4445 * value - 4.7750 * value**3 + 2.0315 * value**5
    return value


@pytest.mark.parametrize("shape", [(3, 5), (5, 3), (4, 4)], ids=str)
def test_the_iteration_changes_singular_values_alone(shape):
    least = min(shape)
    left, right = (torch.linalg.qr(drawn(side, side, seed=side))[0][:, :least] for side in shape)
    values = torch.tensor([4.0, 2.0, 0.5, 0.1])[:least]
    expected = torch.tensor([by_hand(float(value / values.norm())) for value in values])
    found = orthogonal(left @ values.diag() @ right.T)
    assert torch.allclose(found, left @ expected.diag() @ right.T, atol=1e-5)
    assert bool(((expected > 0.65) & (expected < 1.25)).all())


def test_zeros_have_no_direction():
    assert torch.equal(orthogonal(torch.zeros(3, 2)), torch.zeros(3, 2))


@pytest.mark.parametrize("shape", [(16, 48), (48, 16)], ids=str)
def test_steps_on_a_matrix_are_those_of_torchs_muon_in_bfloat16(shape):
    ours, theirs = (torch.nn.Parameter(drawn(*shape)) for _ in range(2))
    mine = Muon([ours], [ours], **SETTINGS)
    torchs = torch.optim.Muon([theirs], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    for number in range(4):
        ours.grad, theirs.grad = (drawn(*shape, seed=number + 1) for _ in range(2))
        mine.step()
        torchs.step()
    moved = (theirs.detach() - drawn(*shape)).norm()
    assert float((ours - theirs).detach().norm()) < 0.01 * float(moved)
    # A step without weight decay has about the length of AdamW's.
    assert 0.5 * LENGTH < float(moved) / (4 * 0.02 * shape[0] ** 0.5 * shape[1] ** 0.5) < 2 * LENGTH


def test_what_is_no_matrix_steps_as_in_adamw_to_the_bit():
    ours, theirs = ([torch.nn.Parameter(drawn(6)), torch.nn.Parameter(drawn(4, 3))] for _ in range(2))
    mine, adamw = Muon(ours, ours[1:], **SETTINGS), torch.optim.AdamW(theirs, **SETTINGS)
    for number in range(3):
        for each in (*ours, *theirs):
            each.grad = drawn(*each.shape, seed=number)
        mine.step()
        adamw.step()
    assert torch.equal(ours[0], theirs[0]) and not torch.equal(ours[1], theirs[1])


@pytest.mark.parametrize("tied", [True, False])
def test_embeddings_head_and_norms_are_no_inner_matrices(tied):
    config = tiny_model(64).config
    config.tie_word_embeddings = tied
    model = full().attach(LlamaForCausalLM(config), 0)
    found = inner_matrices(model, trained(model))
    assert all("proj" in name for name in found)
    rest = trained(model).keys() - found.keys()
    assert len(rest) == 2 * model.config.num_hidden_layers + 2 + (not tied)
    assert all("norm" in name or "embed" in name or "lm_head" in name for name in rest)
    assert len(found) == 7 * model.config.num_hidden_layers


def test_a_silo_keeps_one_moment_of_a_matrix_and_two_of_the_rest():
    model = full().attach(tiny_model(64), 0)
    start = {name: value.detach().clone() for name, value in trained(model).items()}
    work = local_training(causal_loss(), 0, steps=2, batch_size=2, optimiser="muon", keep_optimiser=True)
    rows = [Example(row, row) for row in torch.randint(3, 64, (5, 8)).tolist()]
    reply, memory = work.client(Request("a", 0, "train", start), Silo("a", model, {"train": rows, "test": []}, {}, 1))
    matrices = inner_matrices(model, trained(model)).keys()
    assert {name for name in start if f"exp_avg_sq/{name}" not in memory} == matrices
    assert all(memory[f"step/{name}"].item() == 2 and f"exp_avg/{name}" in memory for name in start)
    assert all(bool(value.ne(0).any()) for value in reply.tensors.values())


def test_the_plan_knows_what_a_silo_keeps(recipe):
    parts = build(read_recipe({**recipe, "trainable": "full"}))
    request = Request("a", 0, "train", parts.params)
    _, kept = parts.algorithm.client(request, parts.open_silo(lambda tokens: None)("a"))
    assert remembered(parts) == pytest.approx(size(kept.values()), abs=200)


def test_adapters_are_refused_with_the_remedy(recipe):
    with pytest.raises(FedllmError, match=r"'lora' trains parts beside them; use 'adamw', or trainable\.name = 'full'"):
        build(read_recipe({**recipe, "trainable": "lora"}))
