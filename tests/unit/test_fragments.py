"""Fragments: which layer has its turn when, against algorithm 2 of Streaming DiLoCo, and silos that come and go."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.optimisers import nesterov
from fedllm.core.plan import plan
from fedllm.core.round import averaging
from fedllm.core.tensors import below
from fedllm.core.types import Reply, Request, Silo, Work
from fedllm.exchange.fragments import fragments
from fedllm.exchange.layers import by_layer, by_pattern
from fedllm.exchange.select import everyone
from fedllm.exchange.top_k import top_k
from fedllm.runtime.local import cohort, local

NAMES = ["embed.weight", *(f"layers.{n}.{part}.weight" for n in range(12) for part in ("a", "b")), "norm.weight"]
SILOS = ["a", "b", "c"]


def layers_of(groups, names=NAMES):
    found = {}
    for name, group in groups(names).items():
        found.setdefault(group, []).append(name)
    return [[name.removesuffix(".a.weight") for name in found[group] if ".b." not in name] for group in sorted(found)]


def test_strided_and_sequential_layers_and_where_the_embeddings_go():
    names = [name for name in NAMES if "layers" not in name or int(name.split(".")[1]) < 5]
    outside = ["embed.weight", "norm.weight"]
    strided, following = by_pattern(2, "strided", "first"), by_pattern(2, "sequential", "apart")
    even = [f"layers.{n}" for n in (0, 2, 4)]
    assert layers_of(strided, names) == [["embed.weight", *even, "norm.weight"], ["layers.1", "layers.3"]]
    assert layers_of(following, names) == [["layers.0", "layers.1"], ["layers.2", "layers.3", "layers.4"], outside]
    assert by_pattern(2, "strided", "first")(reversed(names)) == strided(names)


@given(st.integers(1, 12), st.sampled_from(["strided", "sequential"]), st.sampled_from(["first", "apart"]))
def test_every_tensor_has_its_turn_once_in_a_period(count, pattern, embeddings):
    share = fragments(count, pattern, embeddings=embeddings)
    assert share.period == count + (embeddings == "apart")
    params = {name: torch.zeros(1) for name in NAMES}
    for first in (0, 5):
        turns = [name for number in range(first, first + share.period) for name in share.up(number, params)]
        assert sorted(turns) == sorted(NAMES)
    sizes = [sum("layers" in name for name in share.up(n, params)) for n in range(count)]
    assert max(sizes) - min(sizes) <= 2


@pytest.mark.parametrize(
    ("part", "reason"),
    [
        ({"count": 0}, "share has no fragment"),
        ({"layers": []}, "share has no fragment"),
        ({"count": 4, "delay": 4}, "share.delay is 4"),
        ({"count": 4, "delay": -1}, "share.delay is -1"),
        ({"mixing": 1.0}, "share.mixing is 1"),
        ({"count": 4, "rounds": 3}, "3 rounds and share takes 4 until every layer has had its turn; set rounds"),
        ({"count": 13}, "share.count is 13 but what is trained has 12 layers"),
        ({"layers": [[0, 2], [1, *range(3, 11)]]}, "share never visits layer 11; add it to one of the lists"),
        ({"layers": [[0], [*range(4, 12)]]}, "share never visits layer 1, 2, 3; add them"),
        ({"layers": [[*range(12)], [12]]}, r"a fragment without any layer of this model \(number 2: \[12\]\)"),
        ({"layers": [[*range(12)], [3]]}, "layer 3 in two fragments"),
    ],
)
def test_a_schedule_that_would_leave_something_out_is_refused_with_the_remedy_before_anything_runs(part, reason):
    with pytest.raises(FedllmError, match=reason):
        build(fragments(**part), {name: torch.zeros(1) for name in NAMES})


def test_embeddings_of_their_own_need_embeddings():
    with pytest.raises(FedllmError, match=r"share.embeddings is 'apart'"):
        by_layer([[0]], "apart")(["layers.0.weight"])


class Toy(nn.Module):
    """A model of nothing but parameters with these names."""

    def __init__(self, params):
        super().__init__()
        for name, value in params.items():
            module = self
            *path, last = name.split(".")
            for part in path:
                if not hasattr(module, part):
                    module.add_module(part, nn.Module())
                module = getattr(module, part)
            module.register_parameter(last, nn.Parameter(value.clone()))


def start_of(layers, seed=0):
    draw = torch.Generator().manual_seed(seed)
    names = ["embed.weight", *(f"layers.{n}.weight" for n in range(layers))]
    return {name: torch.randn(3, generator=draw, dtype=torch.float64) for name in names}


def descend(weights, data, number):
    """A round of local training: all weights a third of the way to where this silo and round want them."""
    return {name: value - (value - data["goal"][name] - 0.1 * number) / 3 for name, value in weights.items()}


def train(request, silo):
    assert request.tensors.keys() == dict(silo.model.named_parameters()).keys()
    end = descend(request.tensors, silo.data, request.round)
    update = {name: value - end[name] for name, value in request.tensors.items()}
    seen = silo.memory.get("rounds", torch.zeros(1)) + 1
    return Reply(request.client, request.round, update, silo.data["weight"]), {"rounds": seen}


def build(share, params, select=None, **parts):
    work = Work(train, lambda members: [train(*member) for member in members])
    algorithm = averaging(work=work, select=select or everyone(SILOS), aggregate=mean(), share=share, **parts)
    plan(algorithm, params)
    return algorithm


def silos(start):
    model = Toy(start)
    return {
        name: Silo(name, model, {"goal": start_of(len(start) - 1, place + 1), "weight": place + 1.0}, {}, 7)
        for place, name in enumerate(SILOS)
    }


def recorded(exchange, log):
    """Write down what each request and reply held."""

    def through(requests):
        log.append({request.client: (set(request.tensors), None) for request in requests})
        for reply in exchange(requests):
            log[-1][reply.client] = (log[-1][reply.client][0], set(reply.tensors))
            yield reply

    return through


def algorithm_two(start, opened, size, delay, mixing, rounds, rate, momentum):
    """Algorithm 2 in one place, without messages: what every replica holds, and the outer step for each fragment."""
    place = by_pattern(size, "strided", "first")(start)
    parts = [[name for name in start if place[name] == p] for p in range(size)]
    outer = {name: nn.Parameter(value.clone()) for name, value in start.items()}
    steps = [torch.optim.SGD([outer[name] for name in part], rate, momentum, nesterov=momentum > 0) for part in parts]
    own = {name: dict(start) for name in opened}
    whole = sum(silo.data["weight"] for silo in opened.values())
    for number in range(rounds):
        if number - 1 - delay >= 0:
            for weights in own.values():
                for name in parts[(number - 1 - delay) % size]:
                    weights[name] = mixing * weights[name] + (1 - mixing) * outer[name].detach().clone()
        for name, silo in opened.items():
            own[name] = descend(own[name], silo.data, number)
        for name in parts[number % size]:
            changes = [silo.data["weight"] * (outer[name].detach() - own[s][name]) for s, silo in opened.items()]
            outer[name].grad = sum(changes) / whole
        steps[number % size].step()
    return {name: value.detach() for name, value in outer.items()}


@st.composite
def cases(draw):
    layers = draw(st.integers(1, 5))
    size = draw(st.integers(1, layers))
    return layers, size, draw(st.integers(0, size - 1)), draw(st.sampled_from([0.0, 0.3, 0.5])), draw(st.booleans())


@settings(deadline=None, max_examples=40)
@given(cases())
def test_the_rounds_are_algorithm_2_of_the_paper(case):
    layers, size, delay, mixing, batched = case
    start = start_of(layers)
    opened = silos(start)
    algorithm = build(fragments(size, delay=delay, mixing=mixing), start, optimiser=nesterov(0.5, 0.6), transforms=[])
    way = cohort(algorithm.cohort, opened.get, {}, 2) if batched else local(algorithm.client, opened.get, {})
    state = algorithm.init(start)
    for _ in range(3 * size + 1):
        state, _ = algorithm.server(state, way)
    expected = algorithm_two(start, opened, size, delay, mixing, 3 * size + 1, 0.5, 0.6)
    for name in start:
        torch.testing.assert_close(state.params[name], expected[name], rtol=1e-10, atol=1e-10)


def test_one_fragment_is_plain_averaging_bit_for_bit():
    start = start_of(3)
    ends = []
    for share in (None, fragments(1)):
        algorithm = build(share, start, optimiser=nesterov(), transforms=[top_k(0.4)])
        state, way = algorithm.init(start), local(algorithm.client, silos(start).get, {})
        for _ in range(5):
            state, _ = algorithm.server(state, way)
        ends.append(state.params)
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in start)


def part(algorithm_share, number, start):
    return set(algorithm_share.up(number, start))


@pytest.mark.parametrize("delay", [0, 2])
def test_one_fragment_travels_each_way_a_round_after_the_whole_model_once(delay):
    start, share, log = start_of(6), fragments(3, delay=delay), []
    algorithm = build(share, start)
    state, way = algorithm.init(start), recorded(local(algorithm.client, silos(start).get, {}), log)
    for _ in range(8):
        state, _ = algorithm.server(state, way)
    for number, messages in enumerate(log):
        due = number - 1 - delay
        down = set(start) if number == 0 else part(share, due, start) if due >= 0 else set()
        assert all(message == (down, part(share, number, start)) for message in messages.values())


def test_the_plans_bytes_are_those_of_the_largest_fragment():
    start = start_of(4)  # 3 float64 values each: two layers and the embeddings, or two layers
    costs = plan(build(fragments(2), start), start)
    assert (costs.bytes_down, costs.bytes_up) == (3 * 24, 3 * 24)
    costs = plan(build(fragments(2), start, transforms=[top_k(0.3)]), start)
    assert (costs.bytes_down, costs.bytes_up) == (3 * 24, 3 * (8 + 4))


@pytest.mark.parametrize("delay", [0, 1])
def test_a_silo_that_comes_late_gets_all_and_one_that_was_away_what_it_missed(delay):
    start, share, log = start_of(8), fragments(4, delay=delay), []
    turns = [["a", "b"], ["a"], ["a"], ["a", "b"], ["a", "b", "c"], ["a", "b", "c"], *[["a"]] * 5, ["a", "b", "c"]]
    algorithm = build(share, start, select=lambda number: turns[number % len(turns)])
    opened, memory = silos(start), {}
    way = recorded(local(algorithm.client, opened.get, memory), log)
    state, before = algorithm.init(start), []
    for _ in turns:
        before.append(state.params)
        state, report = algorithm.server(state, way)
        assert report["clients"] == report["asked"]
    sent = [{name: message[0] for name, message in messages.items()} for messages in log]
    missed = set().union(*(part(share, number, start) for number in range(3 - delay)))
    assert sent[3]["b"] == missed and sent[3]["a"] == part(share, 2 - delay, start)
    assert sent[4]["c"] == set(start) and sent[4]["a"] == sent[4]["b"]
    # The one that came late knows already what the others wait for.
    assert sent[5]["c"] == (sent[5]["a"] if delay == 0 else set())
    assert sent[11]["b"] == sent[11]["c"] == set(start)
    for name in start:
        assert torch.equal(memory["c"][f"work/anchor/{name}"], before[11][name])


@pytest.mark.parametrize(("delay", "told"), [(0, False), (1, True), (2, True)])
def test_with_a_delay_a_round_says_what_the_next_will_ask_of_who_answers_in_it(delay, told):
    start, rounds, log = start_of(6), 10, []
    turns = [SILOS if number != 5 else ["a", "c"] for number in range(rounds + 1)]
    algorithm = build(fragments(3, delay=delay, mixing=0.5, rounds=rounds), start, select=turns.__getitem__)
    lost = {(3, "b")}
    way = dropping(local(algorithm.client, silos(start).get, {}), lost)

    def noting(requests):
        # As they are now: what a server holds changes from round to round.
        log.append({each.client: each._replace(tensors=dict(each.tensors)) for each in requests})
        return way(requests)

    state = algorithm.init(start)
    for _ in range(rounds):
        state, _ = algorithm.server(state, noting)
    for number, (now, later) in enumerate(pairwise(log)):
        for name, asked in now.items():
            if not told or name not in later:
                assert asked.then is None
            else:
                said, came = asked.then, later[name]
                assert (said.client, said.round, said.op) == (came.client, came.round, came.op)
                alike = said.tensors.keys() == came.tensors.keys()
                assert alike == ((number, name) not in lost)
                assert not alike or all(torch.equal(said.tensors[key], came.tensors[key]) for key in came.tensors)
    assert all(asked.then is None for asked in log[-1].values())


def dropping(exchange, lost):
    """Lose replies on their way, by round and silo."""
    return lambda requests: (reply for reply in exchange(requests) if (reply.round, reply.client) not in lost)


@pytest.mark.parametrize("delay", [0, 1, 2])
def test_a_lost_reply_is_followed_by_the_whole_model_of_which_the_silo_takes_what_is_new(delay):
    start, share, log = start_of(6), fragments(3, delay=delay, mixing=0.5), []
    algorithm = build(share, start)
    opened, memory = silos(start), {}
    way = recorded(dropping(local(algorithm.client, opened.get, memory), {(2, "b"), (3, "b"), (6, "b")}), log)
    state = algorithm.init(start)
    for number in range(10):
        state, report = algorithm.server(state, way)
        assert report["clients"] == (2 if number in (2, 3, 6) else 3)
        if number == 3:
            # Fragment 1 had its turn in round 1 and not since; what b changed of it goes on.
            (name, *_) = part(share, 1, start)
            assert not torch.equal(memory["b"][f"work/own/{name}"], state.params[name])
    whole = [number for number, messages in enumerate(log) if messages["b"][0] == set(start)]
    assert whole == [0, 3, 4, 7]
    for one, other in pairwise(memory[silo]["work/known"].item() for silo in SILOS):
        assert one == other


def test_a_silo_that_lost_its_memory_is_refused_once_and_begins_again():
    start, share = start_of(4), fragments(2)
    algorithm = build(share, start)
    opened, memory = silos(start), {}

    def forgiving(request, silo):
        try:
            return algorithm.client(request, silo)
        except Refused as problem:
            refused.append((request.round, request.client, str(problem)))
            return Reply("nobody", request.round, {}, 1.0), silo.memory

    refused, state = [], algorithm.init(start)
    old = None
    for number in range(9):
        if number == 2:
            memory.pop("b")
        if number == 4:
            old = dict(memory["c"])
        if number == 6:
            memory["c"] = old
        state, report = algorithm.server(state, local(forgiving, opened.get, memory))
        assert report["clients"] == (2 if number in (2, 6) else 3)
    assert [(number, name) for number, name, _ in refused] == [(2, "b"), (6, "c")]
    assert "remembers nothing" in refused[0][2] and "earlier round" in refused[1][2]


def test_a_silo_whose_weights_are_lost_begins_again_from_the_whole_model():
    start = start_of(4)
    algorithm = build(fragments(2), start)
    opened, memory = silos(start), {}
    state = algorithm.init(start)
    for number in range(6):
        goal = {name: value / (0 if number == 2 else 1) for name, value in silos(start)["b"].data["goal"].items()}
        opened["b"] = opened["b"]._replace(data={**opened["b"].data, "goal": goal})
        state, report = algorithm.server(state, local(algorithm.client, opened.get, memory))
        assert report["clients"] == (2 if number == 2 else 3)
        assert ("b" in memory) == (number != 2)
    assert all(bool(value.isfinite().all()) for value in state.params.values())


def test_what_error_feedback_keeps_of_a_fragment_waits_for_its_turn():
    start, share, log = start_of(4), fragments(2), []
    algorithm = build(share, start, transforms=[top_k(0.4)])
    memory, before = {}, {}
    way = recorded(local(algorithm.client, silos(start).get, memory), log)
    state = algorithm.init(start)
    for number in range(6):
        state, _ = algorithm.server(state, way)
        own, now = part(share, number, start), below("0.top 0.4", memory["b"])
        assert log[-1]["b"][1] == {f"{name}:{what}" for name in own for what in ("values", "positions")}
        assert now.keys() == (own if number == 0 else start.keys())
        assert all(torch.equal(now[name], before[name]) for name in before if name not in own)
        assert not any(torch.equal(now[name], before[name]) for name in before if name in own)
        before = now


@pytest.mark.parametrize("delay", [0, 1])
def test_a_run_that_starts_again_from_state_and_memory_has_the_same_bits(delay, tmp_path):
    from fedllm.runtime.store import Checkpoint, load_checkpoint, save_checkpoint

    start = start_of(6)
    algorithm = build(fragments(3, delay=delay), start, optimiser=nesterov(warmup=2), transforms=[top_k(0.5)])

    def go_on(state, memory, until, lost=frozenset({(1, "b"), (4, "c")})):
        way = dropping(local(algorithm.client, silos(start).get, memory), lost)
        while state.round < until:
            state, _ = algorithm.server(state, way)
        return state

    straight = go_on(algorithm.init(start), {}, 9)
    memory = {}
    state = go_on(algorithm.init(start), memory, 4)
    save_checkpoint(tmp_path, Checkpoint(state, memory))
    kept = load_checkpoint(tmp_path)
    again = go_on(kept.state, kept.memory, 9)
    for one, other in zip(straight[1:], again[1:], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def test_neither_request_nor_memory_is_changed():
    start = start_of(4)
    algorithm = build(fragments(2, delay=1, mixing=0.5), start)
    silo = silos(start)["a"]
    _, memory = algorithm.client(Request("a", 0, "train", start), silo)
    for request in (Request("a", 1, "train", {}), Request("a", 2, "train", start)):
        copies = [{name: value.clone() for name, value in held.items()} for held in (memory, request.tensors)]
        _, after = algorithm.client(request, silo._replace(memory=memory))
        for held, copy in zip((memory, request.tensors), copies, strict=True):
            assert all(torch.equal(held[name], copy[name]) for name in copy)
        memory = after
