"""Local training over many rounds: the optimiser that stays, the learning rate's place in the run, the weight."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.schedule import Schedule, factor
from fedllm.core.types import Request, Silo
from fedllm.silo.examples import Example, draws
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import full, lora, trained
from fedllm.silo.training import local_training
from tests.tiny import tiny_model

VOCABULARY = 64


def examples(count, seed, length=8):
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(3, VOCABULARY, (count, length), generator=draw).tolist()
    return [Example(row, row) for row in ids]


ROWS = examples(7, 0)


def silo(model, memory=None, name="a", rows=ROWS, seed=5):
    return Silo(name, model, {"train": rows, "test": []}, memory or {}, seed)


def work(**settings):
    return local_training(causal_loss(), 0, **{"batch_size": 2, "learning_rate": 1e-2, **settings})


@pytest.fixture(scope="module")
def model():
    return full().attach(tiny_model(VOCABULARY), 0)


@pytest.fixture(scope="module")
def start(model):
    return {name: value.detach().clone() for name, value in trained(model).items()}


@pytest.fixture(scope="module")
def adapters():
    model = lora(4).attach(tiny_model(VOCABULARY), 0)
    draw = torch.Generator().manual_seed(1)
    return model, {n: v.detach() + 0.05 * torch.randn(v.shape, generator=draw) for n, v in trained(model).items()}


def in_rounds(work, model, start, rounds, first=0):
    """Train in rounds, each from exactly the weights that the one before ended with; return those at the end."""
    weights, memory = start, {}
    for number in range(first, first + rounds):
        _, memory = work.client(Request("a", number, "train", weights), silo(model, memory))
        weights = {name: value.detach().clone() for name, value in trained(model).items()}
    return weights, memory


@pytest.mark.parametrize(
    "settings",
    [
        {"weight_decay": 0.1},
        {"betas": (0.8, 0.95), "max_grad_norm": 0.1, "micro_batch": 1},
        {"schedule": "cosine", "warmup": 3},
        {"schedule": "linear", "warmup": 0.25, "floor": 0.1},
        {"optimiser": "sgd", "schedule": "cosine"},
        {"optimiser": "muon", "weight_decay": 0.1},
    ],
    ids=str,
)
def test_rounds_with_a_kept_optimiser_are_one_training_bit_for_bit(model, start, settings):
    ends = [
        in_rounds(work(steps=12 // rounds, rounds=rounds, keep_optimiser=True, **settings), model, start, rounds)
        for rounds in (1, 2, 3, 12)
    ]
    assert max(float((ends[0][0][name] - start[name]).abs().max()) for name in start) > 1e-3
    for weights, memory in ends[1:]:
        assert all(torch.equal(weights[name], ends[0][0][name]) for name in start)
        assert memory.keys() == ends[0][1].keys()
        assert all(torch.equal(memory[name], ends[0][1][name]) for name in memory)


def test_an_optimiser_that_starts_afresh_goes_another_way_and_leaves_nothing(model, start):
    kept, _ = in_rounds(work(steps=2, keep_optimiser=True), model, start, 3)
    fresh, memory = in_rounds(work(steps=2), model, start, 3)
    assert memory == {}
    assert any(not torch.equal(kept[name], fresh[name]) for name in start)


def test_what_is_kept_is_adamws_state_and_is_not_changed_where_it_was(model, start):
    way = work(steps=3, keep_optimiser=True)
    _, memory = way.client(Request("a", 0, "train", start), silo(model))
    assert memory.keys() == {f"{key}/{name}" for name in start for key in ("step", "exp_avg", "exp_avg_sq")}
    assert all(memory[f"step/{name}"].item() == 3 for name in start)
    copies = {name: value.clone() for name, value in memory.items()}
    _, after = way.client(Request("a", 1, "train", start), silo(model, memory))
    assert all(torch.equal(memory[name], copies[name]) for name in memory)
    assert all(after[f"step/{name}"].item() == 6 for name in start)


def test_moments_that_are_not_finite_are_forgotten(model, start):
    way = work(steps=1, keep_optimiser=True)
    name = next(iter(start))
    lost = {**start, name: torch.full_like(start[name], float("nan"))}
    reply, memory = way.client(Request("a", 0, "train", lost), silo(model))
    assert not bool(reply.tensors[name].isfinite().all()) and memory == {}


def test_the_batches_depend_on_the_absolute_step_alone():
    whole = list(draws(ROWS, 3, 0, 12, 9))
    for steps in (1, 2, 3, 4, 6):
        assert [rows for r in range(12 // steps) for rows in draws(ROWS, 3, r * steps, steps, 9)] == whole


def sgd_move(model, start, number, **settings):
    """How far one step of one round moves the weights, in units of what a learning rate of 1 moves them."""
    way = work(steps=1, batch_size=7, optimiser="sgd", max_grad_norm=0, **settings)
    reply, _ = way.client(Request("a", number, "train", start), silo(model))
    name = "model.layers.0.mlp.down_proj.weight"
    return float(reply.tensors[name].norm())


def test_a_silo_that_comes_late_has_the_learning_rate_of_its_round(model, start):
    # All rows are in every batch, so that the gradient is the same one in every round.
    whole = sgd_move(model, start, 0)
    for number in (0, 1, 2, 5, 9, 30):
        moved = sgd_move(model, start, number, rounds=10, schedule="cosine", warmup=2, floor=0.1)
        assert moved == pytest.approx(whole * factor(Schedule("cosine", 2, 0.1), number, 10), rel=1e-4)


def test_a_constant_rate_needs_no_length_and_is_as_before(model, start):
    plain = work(steps=2).client(Request("a", 3, "train", start), silo(model))[0]
    told = work(steps=2, rounds=9, schedule="constant").client(Request("a", 3, "train", start), silo(model))[0]
    assert all(torch.equal(plain.tensors[name], told.tensors[name]) for name in start)


def test_betas_are_adamws(model, start):
    replies = [
        work(steps=2, **extra).client(Request("a", 0, "train", start), silo(model))[0].tensors
        for extra in ({}, {"betas": (0.9, 0.999)}, {"betas": (0.5, 0.9)})
    ]
    assert all(torch.equal(replies[0][name], replies[1][name]) for name in start)
    assert any(not torch.equal(replies[0][name], replies[2][name]) for name in start)


def test_the_weight_is_examples_or_tokens_scored_in_the_round(model, start):
    request = Request("a", 0, "train", start)
    rows = examples(3, 1, 5) + examples(1, 2, 9)
    assert work(steps=2, batch_size=4).client(request, silo(model, rows=rows))[0].weight == 4
    # All four rows twice: 3 of 5 tokens and one of 9, of which each row's first is not scored.
    reply, _ = work(steps=2, batch_size=4, weight="tokens").client(request, silo(model, rows=rows))
    assert reply.weight == 2 * (3 * 4 + 8) and reply.scalars["tokens"] == 2 * (3 * 5 + 9)


def test_a_cohort_with_kept_optimisers_equals_its_clients_one_by_one(adapters):
    model, start = adapters
    way = work(
        steps=2, keep_optimiser=True, rounds=5, schedule="cosine", warmup=0.4, weight="tokens", learning_rate=1e-3
    )
    rows = [examples(4, seed, 6 + seed) for seed in range(4)]
    alone, together = {}, {}
    # Two of them come late, and one is away in between: none has made as many steps as another for long.
    for number, names in enumerate([(0, 1), (0, 1, 2), (0, 2, 3), (0, 1, 2, 3)]):
        requests = [Request(f"s{place}", number, "train", start) for place in names]
        one = [
            way.client(r, silo(model, alone.get(r.client), r.client, rows[p], p))
            for r, p in zip(requests, names, strict=True)
        ]
        many = way.cohort(
            [
                (r, silo(model, together.get(r.client), r.client, rows[p], p))
                for r, p in zip(requests, names, strict=True)
            ]
        )
        for (mine, kept), (theirs, held) in zip(one, many, strict=True):
            assert (mine.client, mine.weight, mine.scalars["tokens"]) == (
                theirs.client,
                theirs.weight,
                theirs.scalars["tokens"],
            )
            assert kept.keys() == held.keys()
            for name in mine.tensors:
                torch.testing.assert_close(mine.tensors[name], theirs.tensors[name], rtol=0, atol=1e-4)
            for name in kept:
                torch.testing.assert_close(kept[name], held[name], rtol=1e-3, atol=1e-5)
            alone[mine.client], together[theirs.client] = kept, held
    steps = {name: int(next(iter(v for k, v in kept.items() if k.startswith("step/")))) for name, kept in alone.items()}
    assert steps == {"s0": 8, "s1": 6, "s2": 6, "s3": 4}


def test_one_lost_member_costs_no_other_of_the_batch_its_moments(adapters):
    model, start = adapters
    way = work(steps=1, keep_optimiser=True)
    lost = {name: torch.full_like(value, float("nan")) for name, value in start.items()}
    (_, kept), (_, none) = way.cohort(
        [(Request("a", 0, "train", start), silo(model)), (Request("b", 0, "train", lost), silo(model, name="b"))]
    )
    assert none == {} and len(kept) == 3 * len(start)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 0}, "client.steps is 0; it must be above 0"),
        ({"betas": (0.9, 1.0)}, "client.betas is"),
        ({"warmup": -1}, "client.warmup is -1"),
        ({"warmup": 1.5}, "client.warmup is 1.5"),
        ({"floor": 1.5}, "client.floor is 1.5"),
        ({"schedule": "cosine"}, "client.rounds is missing"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(FedllmError, match=reason):
        work(**settings)


def test_a_slow_silo_takes_the_first_steps_of_its_round(model, start):
    # Twice slower at 7 steps a round: 3, with the batches and learning rates that the whole round begins with.
    many = work(steps=7, rounds=3, schedule="cosine", warmup=2, keep_optimiser=True, weight="tokens")
    slow, _ = many.client(Request("a", 1, "train", start, {"slow": 2.0}), silo(model))
    assert slow.scalars["tokens"] == 3 * 2 * 8 and slow.weight == 3 * 2 * 7
    seen = []
    by_hand = work(steps=7, rounds=3, schedule="cosine", warmup=2, keep_optimiser=True)
    stopping = silo(model)._replace(tick=lambda tokens: seen.append(weights_of(model)))
    by_hand.client(Request("a", 1, "train", start), stopping)
    assert all(torch.equal(start[name] - seen[2][name], slow.tensors[name]) for name in start)


def weights_of(model):
    return {name: value.detach().clone() for name, value in trained(model).items()}
