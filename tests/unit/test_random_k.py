"""A random mask that all silos share: places by seed and round, sums by places, and what a plan lets it go with."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.round import averaging, in_round
from fedllm.core.types import Reply, Request, Silo, Work
from fedllm.exchange.clip import clip
from fedllm.exchange.random_k import random_k
from fedllm.exchange.secure.middleware import secure_sum
from fedllm.exchange.secure.settings import Settings
from fedllm.runtime.local import local

NAMES = ["a", "b", "c", "d"]
LIKE = {"x": torch.zeros(4, 5), "y": torch.zeros(7)}


def update_of(name, number):
    draw = torch.Generator().manual_seed(100 * number + ord(name))
    return {key: torch.randn(value.shape, generator=draw) / 10 for key, value in LIKE.items()}


def places(number, seed=0, fraction=0.25, size=20):
    """Where a round's values lie, seen from outside: what comes back of an update of ones."""
    ones = {"x": torch.ones(size)}
    now = in_round(random_k(fraction, False, seed), number, {})
    return now.decode(now.encode(ones, {}, 7)[0], ones)["x"].nonzero().flatten().tolist()


def test_places_follow_from_seed_and_round_and_from_nothing_else():
    assert places(3) == places(3) and len(places(3)) == 5
    assert len({tuple(places(number)) for number in range(20)}) > 15
    assert places(3, seed=1) != places(3)
    # 400 rounds of five of 20 places: each has its turn about a hundred times.
    turns = torch.bincount(torch.tensor([place for number in range(400) for place in places(number)]), minlength=20)
    assert turns.sum() == 2000 and turns.min() > 60 and turns.max() < 140


def test_only_values_travel():
    wire, _ = random_k(0.25).encode(update_of("a", 0), {}, 0)
    assert {name: value.shape for name, value in wire.items()} == {"x:values": (5,), "y:values": (2,)}


def algorithm(transforms, layers=()):
    def client(request, silo):
        return Reply(silo.name, request.round, update_of(silo.name, request.round), 1.0), {}

    parts = {"aggregate": mean("uniform"), "transforms": transforms, "middleware": layers}
    return averaging(work=Work(client), select=lambda number: NAMES, **parts)


def rounds(made, count):
    memory, state = {}, made.init(LIKE)
    exchange = local(made.client, lambda name: Silo(name, None, {}, {}, ord(name)), memory)
    for _ in range(count):
        state, report = made.server(state, exchange)
        assert report["clients"] == 4
    return state.params, memory


@pytest.mark.parametrize("feedback", [True, False])
def test_the_secure_sum_of_masked_updates_is_their_plain_mean(feedback):
    def layer(transforms):
        stage = averaging(work=Work(None), select=lambda n: NAMES, aggregate=mean(), transforms=transforms).wire(LIKE)
        return secure_sum(Settings(), b"s" * 32, 5.0, lambda number: stage, weighted=False)

    transforms = [random_k(0.3, feedback), clip(5.0)]
    plain, _ = rounds(algorithm(transforms), 3)
    secure, _ = rounds(algorithm(transforms, [layer(transforms)]), 3)
    for name, value in plain.items():
        torch.testing.assert_close(secure[name], value, rtol=0, atol=1e-7)
        assert bool(value.any())


def test_what_was_sent_and_what_the_silos_keep_is_all_that_they_had():
    params, memory = rounds(algorithm([random_k(0.3)]), 6)
    for name in LIKE:
        kept = sum(memory[silo][f"0.random 0.3/{name}"] for silo in NAMES) / 4
        had = sum(update_of(silo, number)[name] for silo in NAMES for number in range(6)) / 4
        torch.testing.assert_close(kept - params[name], had, rtol=0, atol=1e-6)


def test_a_reply_is_read_with_the_mask_of_its_round():
    made = algorithm([random_k(0.25, False)])
    reply, _ = made.client(Request("a", 2, "train", LIKE), Silo("a", None, {}, {}, 1))
    after, _ = made.server(made.init(LIKE)._replace(round=2), lambda requests: iter([reply]))
    moved = after.params["x"] != 0
    assert torch.equal(after.params["x"][moved], -update_of("a", 2)["x"][moved])
    assert moved.flatten().nonzero().flatten().tolist() == places(2)


@pytest.mark.parametrize("fraction", [0.0, 1.5])
def test_a_fraction_that_is_none_is_refused(fraction):
    with pytest.raises(FedllmError, match="above 0 and at most 1"):
        random_k(fraction)
