"""One round over a scripted exchange: what the server takes, what it drops, and what it remembers."""

from __future__ import annotations

import itertools

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.optimisers import fedadam, fedavg
from fedllm.core.round import averaging
from fedllm.core.types import Cut, Middleware, Probe, Reply, Request, Share, Silo, State, Transform, Work

PARAMS = {"w": torch.tensor([[1.0, 2.0], [3.0, 4.0]]), "b": torch.tensor([0.5])}
NAMES = ["a", "b", "c"]


def train(request, silo):
    """Answer the silo's own update; remember how often it was asked."""
    seen = silo.memory.get("seen", torch.zeros(1)) + 1
    return Reply(request.client, request.round, silo.data["train"][0], 2.0, {"loss": 1.0}), {"seen": seen}


def update(number):
    return {"w": torch.full((2, 2), float(number)), "b": torch.tensor([number / 2])}


def replies(*numbers):
    return [Reply(name, 0, update(n), 1.0, {"loss": float(n)}) for name, n in zip(NAMES, numbers, strict=False)]


def scripted(answers):
    return lambda requests: iter(answers)


def build(names=NAMES, **parts):
    defaults = {"work": Work(train), "select": lambda number: names, "aggregate": mean()}
    return averaging(**{**defaults, **parts})


def same(left: State, right: State) -> bool:
    if left.round != right.round:
        return False
    return all(
        one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
        for one, other in zip(left[1:], right[1:], strict=True)
    )


def test_each_selected_client_is_asked_with_all_parameters():
    asked = []

    def exchange(requests):
        asked.extend(requests)
        yield from replies(1, 2, 3)

    algorithm = build()
    algorithm.server(algorithm.init(PARAMS), exchange)
    assert [(r.client, r.round, r.op, r.tensors, dict(r.scalars)) for r in asked] == [
        (name, 0, "train", PARAMS, {}) for name in NAMES
    ]


def test_the_round_by_hand():
    # Mean of 1, 2, 6 weighted 1, 1, 2 is 3.75; of the halves 1.875.
    answers = replies(1, 2, 6)
    answers[2] = answers[2]._replace(weight=2.0)
    algorithm = build()
    after, report = algorithm.server(algorithm.init(PARAMS), scripted(answers))
    assert after.round == 1
    assert after.params["w"].tolist() == [[-2.75, -1.75], [-0.75, 0.25]]
    assert after.params["b"].tolist() == [-1.375]
    assert report == {"loss.a": 1.0, "loss.b": 2.0, "loss.c": 6.0, "clients": 3, "asked": 3}


def test_replies_in_any_order_give_the_same_bits():
    draw = torch.Generator().manual_seed(0)
    answers = [
        Reply(name, 0, {k: torch.randn(v.shape, generator=draw) for k, v in PARAMS.items()}, weight)
        for name, weight in zip(NAMES, (1 / 3, 7.0, 1e6), strict=True)
    ]
    algorithm = build(optimiser=fedadam())
    states = [algorithm.server(algorithm.init(PARAMS), scripted(order))[0] for order in itertools.permutations(answers)]
    assert all(same(states[0], state) for state in states)


GOOD = update(2)
BAD = {
    "not a number": (Reply("c", 0, {**GOOD, "b": torch.tensor([float("nan")])}, 1.0), "'b' is not finite"),
    "infinite": (Reply("c", 0, {**GOOD, "b": torch.tensor([float("inf")])}, 1.0), "'b' is not finite"),
    "a name missing": (Reply("c", 0, {"w": GOOD["w"]}, 1.0), "wrong names: 1 missing ['b'], 0 unknown []"),
    "a name too many": (Reply("c", 0, {**GOOD, "z": GOOD["b"]}, 1.0), "wrong names: 0 missing [], 1 unknown ['z']"),
    "no tensors": (Reply("c", 0, {}, 1.0), "wrong names"),
    "shape": (Reply("c", 0, {**GOOD, "w": torch.ones(4)}, 1.0), "'w' has shape (4,), expected (2, 2)"),
    "dtype": (Reply("c", 0, {**GOOD, "b": GOOD["b"].double()}, 1.0), "'b' has dtype torch.float64, expected"),
    "weight 0": (Reply("c", 0, GOOD, 0.0), "its weight is 0.0"),
    "weight below 0": (Reply("c", 0, GOOD, -1.0), "its weight is -1.0"),
    "weight infinite": (Reply("c", 0, GOOD, float("inf")), "its weight is inf"),
    "weight not a number": (Reply("c", 0, GOOD, float("nan")), "its weight is nan"),
    "weight that overflows": (Reply("c", 0, GOOD, 1e308), "its weight is 1e+308"),
    "another round": (Reply("c", 1, GOOD, 1.0), "it answers round 1, not 0"),
    "a scalar that is not a number": (Reply("c", 0, GOOD, 1.0, {"loss": float("nan")}), "its 'loss' is nan"),
}


@pytest.mark.parametrize("kind", BAD)
def test_a_reply_that_cannot_be_used_is_dropped_and_counted_and_the_round_goes_on(kind):
    bad, reason = BAD[kind]
    algorithm = build()
    state = algorithm.init(PARAMS)
    good, _ = build(["a", "b"]).server(state, scripted(replies(1, 2)))
    for answers in ([*replies(1, 2), bad], [bad, *replies(1, 2)]):
        after, report = algorithm.server(state, scripted(answers))
        assert same(after, good)
        assert reason in report["dropped.c"]
        assert (report["clients"], report["asked"]) == (2, 3) and "loss.c" not in report


def test_a_client_nobody_asked_and_a_second_answer_are_dropped():
    algorithm = build()
    twice = replies(1, 2, 3)[0]._replace(tensors=update(100))
    stranger = Reply("mallory", 0, update(100), 1.0)
    after, report = algorithm.server(algorithm.init(PARAMS), scripted([*replies(1, 2, 3), twice, stranger]))
    assert same(after, algorithm.server(algorithm.init(PARAMS), scripted(replies(1, 2, 3)))[0])
    assert report["dropped.a"] == report["dropped.mallory"] == "it was not asked, or has answered already"
    assert (report["clients"], report["asked"]) == (3, 3)


def test_a_client_that_does_not_answer_is_counted():
    algorithm = build()
    after, report = algorithm.server(algorithm.init(PARAMS), scripted(replies(1, 2)))
    assert after.params["b"].tolist() == [0.5 - 0.75]
    assert report["dropped.c"] == "no reply" and report["clients"] == 2


def test_when_all_are_dropped_the_round_stops_and_names_silos_and_remedy():
    algorithm = build()
    answers = [Reply("a", 0, {**GOOD, "b": torch.tensor([float("nan")])}, 1.0), Reply("b", 0, {}, 1.0)]
    with pytest.raises(FedllmError) as caught:
        algorithm.server(algorithm.init(PARAMS), scripted(answers))
    text = str(caught.value)
    assert "Round 1" in text and "a: 'b' is not finite" in text and "b: wrong names" in text and "c: no reply" in text
    assert "client.learning_rate" in text and "client.max_grad_norm" in text


def test_a_round_that_asks_nobody_goes_on_unchanged():
    algorithm = build([], optimiser=fedadam())
    before = algorithm.init(PARAMS)
    after, report = algorithm.server(before, scripted([]))
    assert same(after, before._replace(round=1))
    assert report == {"clients": 0, "asked": 0}


def test_the_server_changes_nothing_that_it_is_given():
    algorithm = build(optimiser=fedadam(), transforms=[noted("one", 1.0)])
    state = algorithm.init(PARAMS)
    state, _ = algorithm.server(state, scripted(replies(1, 2, 3)))
    copies = State(state.round, *({k: v.clone() for k, v in part.items()} for part in state[1:]))
    answers = [reply._replace(round=1) for reply in replies(1, 2, 3)]
    algorithm.server(state, scripted(answers))
    assert same(state, copies)
    assert all(torch.equal(reply.tensors[k], update(n)[k]) for n, reply in enumerate(answers, 1) for k in PARAMS)


only_b = Share("b", lambda state, client: {"b": state.params["b"]}, lambda number, params: {"b": params["b"]})


def test_only_what_is_shared_is_asked_for_and_changed():
    algorithm = build(share=only_b, optimiser=fedadam())
    asked = []

    def exchange(requests):
        asked.extend(requests)
        yield Reply("a", 0, {"b": torch.tensor([1.0])}, 1.0)

    after, _ = algorithm.server(algorithm.init(PARAMS), exchange)
    assert all(request.tensors.keys() == {"b"} for request in asked)
    assert after.params["w"] is PARAMS["w"] and after.params["b"] < 0.5


def noted(name, factor, log=None):
    """Multiply on the way up, divide on the way down; count in every memory that there is."""
    log = [] if log is None else log

    def encode(update, memory, seed):
        log.append(f"encode {name}")
        kept = {"times": memory.get("times", torch.zeros(1)) + factor}
        return {key: value * factor for key, value in update.items()}, kept

    def decode(wire, like):
        log.append(f"decode {name}")
        assert wire.keys() == like.keys()
        return {key: value / factor for key, value in wire.items()}

    def finish(mean, state, cut):
        log.append(f"finish {name}")
        assert cut == Cut(cut.round, 3, 3.0)
        return mean, {"rounds": state.get("rounds", torch.zeros(1)) + factor}

    return Transform(name, encode, decode, finish)


def over(algorithm, updates, memory):
    """Run the clients on one machine."""

    def exchange(requests):
        for request in requests:
            silo = Silo(request.client, None, {"train": [updates[request.client]]}, memory.get(request.client, {}), 0)
            reply, memory[request.client] = algorithm.client(request, silo)
            yield reply._replace(weight=1.0)

    return exchange


def test_transforms_encode_in_order_and_decode_and_finish_in_reverse():
    log = []
    algorithm = build(transforms=[noted("one", 2.0, log), noted("two", 4.0, log)])
    log.clear()
    memory = {}
    exchange = over(algorithm, dict(zip(NAMES, map(update, (1, 2, 3)), strict=True)), memory)
    after, _ = algorithm.server(algorithm.init(PARAMS), exchange)
    # Once for the shapes, then for each of three clients.
    per_client = ["encode one", "encode two", "decode two", "decode one"]
    assert log == ["encode one", "encode two"] + per_client * 3 + ["finish two", "finish one"]
    assert after.params["b"].tolist() == [-0.5]


def test_each_transform_keeps_its_own_memory_beside_the_clients():
    # The same transform twice: memories are told apart by place.
    algorithm = build(transforms=[noted("same", 2.0), noted("same", 4.0)])
    memory, state = {}, algorithm.init(PARAMS)
    exchange = over(algorithm, dict(zip(NAMES, map(update, (1, 2, 3)), strict=True)), memory)
    for _ in range(2):
        state, _ = algorithm.server(state, exchange)
    assert {name: value.item() for name, value in memory["a"].items()} == {
        "work/seen": 2.0,
        "0.same/times": 4.0,
        "1.same/times": 8.0,
    }
    assert {name: value.item() for name, value in state.transforms.items()} == {
        "0.same/rounds": 4.0,
        "1.same/rounds": 8.0,
    }


def test_what_a_decoder_makes_is_checked_again():
    def decode(wire, like):
        return {name: value / 0 for name, value in wire.items()}

    algorithm = build(transforms=[Transform("divides", lambda u, m, s: (u, {}), decode)])
    with pytest.raises(FedllmError, match="not finite"):
        algorithm.server(algorithm.init(PARAMS), scripted(replies(1, 2, 3)))


def test_a_decoder_may_refuse():
    def decode(wire, like):
        if wire["b"].item() == 1.0:
            raise Refused("no twos")
        return wire

    algorithm = build(transforms=[Transform("picky", lambda u, m, s: (u, {}), decode)])
    _, report = algorithm.server(algorithm.init(PARAMS), scripted(replies(1, 2, 3)))
    assert report["dropped.b"] == "no twos" and report["clients"] == 2


def test_a_cohort_encodes_as_its_clients_do():
    def together(members):
        return [train(request, silo) for request, silo in members]

    algorithm = build(work=Work(train, together), transforms=[noted("one", 2.0)])
    members = [
        (Request(name, 0, "train", PARAMS), Silo(name, None, {"train": [update(n)]}, {}, n))
        for n, name in enumerate(NAMES)
    ]
    for (reply, memory), member in zip(algorithm.cohort(members), members, strict=True):
        alone, remembered = algorithm.client(*member)
        assert all(torch.equal(reply.tensors[k], alone.tensors[k]) for k in PARAMS)
        assert memory.keys() == remembered.keys() == {"work/seen", "0.one/times"}


def layer(name, log, client=None):
    def wrap(inner):
        def exchange(requests):
            log.append(f"{name} in")
            yield from inner(requests)
            log.append(f"{name} out")

        return exchange

    return Middleware(name, wrap, client)


def test_the_first_middleware_is_the_outermost_on_both_sides():
    log = []

    def half(name):
        def wrap(inner):
            def client(request, silo):
                log.append(f"client {name}")
                return inner(request, silo)

            return client

        return wrap

    algorithm = build(middleware=[layer("outer", log, half("outer")), layer("inner", log, half("inner"))])
    algorithm.server(algorithm.init(PARAMS), scripted(replies(1, 2, 3)))
    assert log == ["outer in", "inner in", "inner out", "outer out"]
    log.clear()
    silo = Silo("a", None, {"train": [update(1)]}, {}, 0)
    algorithm.client(Request("a", 0, "train", PARAMS), silo)
    assert log == ["client outer", "client inner"]


def test_a_middleware_with_a_client_half_takes_clients_one_by_one():
    work = Work(train, lambda members: [train(*member) for member in members])
    assert build(work=work).cohort is not None
    assert build(work=work, middleware=[layer("m", [])]).cohort is not None
    assert build(work=work, middleware=[layer("m", [], lambda client: client)]).cohort is None


def test_a_probe_sees_decoded_updates_and_its_numbers_are_reported():
    probe = Probe(
        "sum of b",
        lambda like: 0.0,
        lambda look, update, weight: look + weight * update["b"].item(),
        lambda look: {"sum_of_b": look},
    )
    algorithm = build(probes=[probe], transforms=[Transform("half", lambda u, m, s: (u, {}), halved)])
    _, report = algorithm.server(algorithm.init(PARAMS), scripted(replies(2, 4, 6)))
    assert report["sum_of_b"] == 3.0


def halved(wire, like):
    return {name: value / 2 for name, value in wire.items()}


def test_without_an_optimiser_the_new_parameters_are_the_clients_average():
    states = [
        build(optimiser=optimiser).server(build().init(PARAMS), scripted(replies(1, 2, 3)))[0]
        for optimiser in (None, fedavg(1.0))
    ]
    assert same(*states)
