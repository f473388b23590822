"""Changes to the model sent in few bits: server and silos hold the same copy, and nothing is lost for good."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import nn

from fedllm.core.aggregate import mean
from fedllm.core.errors import Refused
from fedllm.core.optimisers import nesterov
from fedllm.core.round import averaging
from fedllm.core.tensors import below, subtract
from fedllm.core.types import Reply, Request, Silo, State, Work
from fedllm.exchange.deltas import deltas
from fedllm.exchange.quantise import quantise
from fedllm.runtime.local import local

PARAMS = {"weight": torch.linspace(-1, 1, 96).view(8, 12), "bias": torch.zeros(3)}


def model():
    made = nn.Module()
    for name, value in PARAMS.items():
        made.register_parameter(name, nn.Parameter(value.clone()))
    return made


def pull(request, silo):
    """A client that goes a tenth of the way to its own place, and remembers how often it was asked."""
    place = (len(silo.name) + torch.arange(3.0)).repeat(32)
    goals = {"weight": place.view(8, 12), "bias": place[:3]}
    update = {name: 0.1 * (value - goals[name]) for name, value in request.tensors.items()}
    return Reply(request.client, request.round, update, 1.0, {}), {"count": silo.memory.get("count", 0) + torch.ones(1)}


def algorithm(names=("a", "bb"), transforms=(), away=()):
    def select(number):
        return [name for name in names if (name, number) not in away]

    return averaging(
        work=Work(pull), select=select, aggregate=mean(), optimiser=nesterov(), share=deltas(), transforms=transforms
    )


def run(algorithm, rounds, memory, state=None, sent=None):
    """Run some rounds; note what was sent to whom."""
    state = state or algorithm.init(PARAMS)
    inner = local(algorithm.client, lambda name: Silo(name, model(), {}, {}, 0), memory)

    def exchange(requests):
        if sent is not None:
            sent.append({each.client: each.tensors for each in requests})
        return inner(requests)

    for _ in range(rounds):
        state, _ = algorithm.server(state, exchange)
    return state


def held_by(memory):
    return below("held", below("work", memory))


def test_server_and_silos_hold_the_same_copy_to_the_bit():
    memory = {}
    state = run(algorithm(transforms=[quantise(bits=4)]), 7, memory)
    for name in PARAMS:
        for silo in ("a", "bb"):
            assert torch.equal(state.transforms[f"share/held/{name}"], held_by(memory[silo])[name])
    assert memory["a"]["work/inner/count"] == 7


def test_the_first_round_and_who_was_away_get_the_copy_whole_and_the_others_a_seventh_of_it():
    memory, sent = {}, []
    run(algorithm(away={("bb", 2)}), 5, memory, sent=sent)
    size = [{name: sum(v.nbytes for v in each.values()) for name, each in requests.items()} for requests in sent]
    whole = sum(value.nbytes for value in PARAMS.values())
    small = size[1]["a"]
    assert small * 7 < whole
    assert [(each["a"], each.get("bb")) for each in size] == [
        (whole, whole), (small, small), (small, None), (small, whole), (small, small)
    ]  # fmt: skip
    assert torch.equal(held_by(memory["a"])["weight"], held_by(memory["bb"])["weight"])


def test_what_rounding_took_away_is_sent_later():
    share, held = deltas(), {name: torch.zeros_like(value) for name, value in PARAMS.items()}
    state = State(1, PARAMS, {}, {f"share/held/{name}": value for name, value in held.items()})
    errors = []
    for _ in range(4):
        # The server stands still, and the copy comes up to it by a factor of 7 or more a round.
        note = share.note(state, ["a"], {"a"})
        state = state._replace(round=state.round + 1, transforms={f"share/{name}": v for name, v in note.items()})
        left = subtract(PARAMS, below("held", note))
        errors.append(max(float(value.abs().max()) for value in left.values()))
    assert errors[0] <= 1 / 14 * 1.01
    assert all(later <= earlier / 7 for earlier, later in pairwise(errors))


def test_the_run_ends_near_the_one_that_sends_all():
    whole = averaging(work=Work(pull), select=lambda number: ["a", "bb"], aggregate=mean(), optimiser=nesterov())
    exact, near = run(whole, 60, {}), run(algorithm(transforms=[quantise(bits=4)]), 60, {})
    away = {name: float((near.params[name] - exact.params[name]).abs().max()) for name in PARAMS}
    assert 0 < max(away.values()) < 0.02


def test_a_resumed_run_is_the_straight_run():
    plan, memory = algorithm(), {}
    half = run(plan, 3, memory)
    assert torch.equal(run(algorithm(), 3, memory, half).params["weight"], run(plan, 6, {}).params["weight"])


def test_a_change_to_weights_that_a_silo_does_not_hold_is_refused():
    packed, _ = quantise(bits=4, error_feedback=False).encode(PARAMS, {}, 0)
    plan = algorithm()
    for memory in (
        {},
        {"work/held/weight": PARAMS["weight"], "work/held/bias": PARAMS["bias"], "work/known": torch.tensor(1)},
    ):
        with pytest.raises(Refused, match="does not hold"):
            plan.client(Request("a", 5, "train", packed), Silo("a", model(), {}, memory, 0))


def test_the_plan_knows_the_bytes_down():
    meta = {name: value.to("meta") for name, value in PARAMS.items()}
    assert sum(value.nbytes for value in algorithm().down(meta).values()) == 48 + 2 * 2 + 2 + 2
