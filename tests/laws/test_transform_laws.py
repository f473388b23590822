"""Laws of every transform in the catalogue: shapes come back, inputs stay, the plan knows the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.app.catalog import CATALOG, make
from fedllm.app.privacy import AT_SERVER, AT_SILO, TOGETHER
from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.plan import plan, size
from fedllm.core.round import averaging, in_round, wire_stages
from fedllm.core.tensors import require_like
from fedllm.core.types import Reply, Request, Silo, Work, on_meta

SETTINGS = {
    "clip": [{"max_norm": 0.5}, {"max_norm": 1e6}],
    "cast": [{}, {"dtype": "float16"}],
    "top_k": [{"fraction": 0.3}, {"fraction": 1.0}, {"fraction": 0.05, "error_feedback": False}],
    "random_k": [{"fraction": 0.3}, {"fraction": 1.0}, {"fraction": 0.05, "error_feedback": False}],
    "quantise": [
        {},
        {"bits": 4, "block": 3},
        {"bits": 4, "stochastic": True},
        {"block": 1, "stochastic": True, "error_feedback": False},
    ],
    "dct": [{}, {"keep": 3, "chunk": 4}, {"keep": 2, "chunk": 20, "beta": 0.0}, {"keep": 10**9, "sign": True}],
}
PARTS = [{"name": name, **each} for name, many in SETTINGS.items() for each in many]
EVERY = pytest.mark.parametrize("part", PARTS, ids=str)

SHAPES = st.lists(st.lists(st.integers(1, 7), min_size=0, max_size=3).map(tuple), min_size=1, max_size=4)
DTYPES = st.sampled_from([torch.float32, torch.float32, torch.bfloat16])
LIKE = st.tuples(SHAPES, st.lists(DTYPES, min_size=4, max_size=4), st.integers(0, 2**32))


def draw_update(shapes, dtypes, seed):
    draw = torch.Generator().manual_seed(seed)
    return {
        f"layer.{number}": torch.randn(shape, generator=draw).to(dtype)
        for number, (shape, dtype) in enumerate(zip(shapes, dtypes, strict=False))
    }


def test_every_transform_of_the_catalogue_is_under_these_laws():
    """But for those that add noise, which change what they pass on and have laws of their own."""
    assert SETTINGS.keys() == CATALOG["transforms"].keys() - {*AT_SERVER, *AT_SILO, *TOGETHER}


@EVERY
@settings(deadline=None, max_examples=25)
@given(LIKE)
def test_decoding_what_was_encoded_keeps_names_shapes_and_dtypes(part, like):
    transform = make("transforms", part)
    update, memory = draw_update(*like), {}
    for number in range(2):
        wire, memory = transform.encode(update, memory, number)
        require_like(transform.decode(wire, on_meta(update)), update)


@EVERY
@settings(deadline=None, max_examples=25)
@given(LIKE)
def test_inputs_are_never_changed(part, like):
    transform = make("transforms", part)
    update = draw_update(*like)
    copy = {name: value.clone() for name, value in update.items()}
    _, memory = transform.encode(update, {}, 0)
    held = {name: value.clone() for name, value in memory.items()}
    wire, _ = transform.encode(update, memory, 0)
    sent = {name: value.clone() for name, value in wire.items()}
    transform.decode(wire, update)
    for now, before in ((update, copy), (memory, held), (wire, sent)):
        assert now.keys() == before.keys() and all(torch.equal(now[name], before[name]) for name in now)


@EVERY
@settings(deadline=None, max_examples=25)
@given(LIKE)
def test_shapes_alone_say_what_travels(part, like):
    transform = make("transforms", part)
    update = draw_update(*like)
    promised, _ = transform.encode(on_meta(update), {}, 0)
    wire, _ = transform.encode(update, {}, 0)
    assert {name: (value.shape, value.dtype) for name, value in promised.items()} == {
        name: (value.shape, value.dtype) for name, value in wire.items()
    }
    assert all(value.device.type == "meta" for value in promised.values())


def remembers(part):
    """Whether what a transform did not send is added to the next update, place by place."""
    none = {"clip": True, "cast": True, "dct": part.get("beta") == 0.0}
    return not none.get(part["name"], part.get("error_feedback") is False)


def moves(part):
    """Whether what a transform sends is not the update value by value."""
    return part["name"] in ("top_k", "random_k", "quantise", "dct")


def fits(chain):
    return not any(remembers(part) and any(map(moves, chain[:place])) for place, part in enumerate(chain))


CHAINS = st.lists(st.sampled_from(PARTS), max_size=3)


@settings(deadline=None, max_examples=60)
@given(CHAINS.filter(fits), SHAPES, st.integers(0, 2**32))
def test_the_plans_bytes_are_those_of_an_encoded_update_for_any_chain(chain, shapes, seed):
    transforms = [make("transforms", part) for part in chain]
    params = draw_update(shapes, [torch.float32] * 4, seed)

    def client(request, silo):
        return Reply(request.client, request.round, dict(params), 1.0), {}

    algorithm = averaging(work=Work(client), select=lambda n: ["a"], aggregate=mean(), transforms=transforms)
    request = Request("a", 0, "train", params)
    reply, _ = algorithm.client(request, Silo("a", None, {}, {}, 0))
    promised = plan(algorithm, params)
    assert promised.bytes_up == size(reply.tensors.values())
    assert promised.bytes_down == sum(4 * value.numel() for value in params.values())
    require_like(reply.tensors, wire_stages(transforms, params)[-1])
    after, report = algorithm.server(algorithm.init(params), lambda requests: iter([reply]))
    assert report["clients"] == 1
    require_like(after.params, params)


@pytest.mark.parametrize("first", [part for part in PARTS if moves(part)], ids=str)
@pytest.mark.parametrize("second", [part for part in PARTS if remembers(part)], ids=str)
def test_nothing_is_remembered_of_values_that_are_others_in_the_next_round(first, second):
    transforms = [make("transforms", part) for part in (first, second)]
    algorithm = averaging(work=Work(None), select=lambda n: ["a"], aggregate=mean(), transforms=transforms)
    with pytest.raises(FedllmError, match="put it first"):
        plan(algorithm, {"x": torch.zeros(5)})


WHOLE = [{"name": name, "fraction": fraction} for name in ("top_k", "random_k") for fraction in (0.1, 0.3, 0.7)] + [
    {"name": "quantise", "bits": 8, "block": 5},
    {"name": "quantise", "bits": 4},
    {"name": "quantise", "bits": 4, "stochastic": True},
    {"name": "dct", "keep": 2, "chunk": 8, "beta": 1.0},
]


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(WHOLE), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32))
def test_with_error_feedback_nothing_is_lost(part, width, rounds, seed):
    transform = make("transforms", part)
    draw = torch.Generator().manual_seed(seed)
    # Whole numbers, so that sums are exact where a codec's values are.
    updates = [{"x": torch.randint(-100, 100, (width,), generator=draw).float()} for _ in range(rounds)]
    memory, sent = {}, torch.zeros(width, dtype=torch.float64)
    for number, update in enumerate(updates):
        now = in_round(transform, number, memory)
        wire, memory = now.encode(update, memory, number)
        sent += now.decode(wire, update)["x"]
    tolerance = 0.0 if part["name"] in ("top_k", "random_k") else 1e-3
    given_in_all = sum(update["x"].double() for update in updates)
    torch.testing.assert_close(sent + memory["x"], given_in_all, rtol=0, atol=tolerance)


def twice_the_rounds(part, rounds):
    """How far the mean of what was sent is from the mean of what was to be sent, which is the same in every round."""
    transform = make("transforms", part)
    update = draw_update([(12, 9)], [torch.float32], 1)
    memory, sent = {}, 0
    for number in range(rounds):
        now = in_round(transform, number, memory)
        wire, memory = now.encode(update, memory, number)
        sent += now.decode(wire, update)["layer.0"]
    return float((sent / rounds - update["layer.0"]).norm() / update["layer.0"].norm())


@pytest.mark.parametrize("part", WHOLE, ids=str)
def test_what_error_feedback_keeps_stays_bounded_so_that_the_mean_comes_to_be_right(part):
    # What is kept does not grow, so that the error of the mean falls as one over the rounds.
    assert twice_the_rounds(part, 200) < 0.15 * max(twice_the_rounds(part, 10), 1e-6) + 1e-6


@EVERY
def test_what_a_round_does_not_update_is_remembered(part):
    transform = make("transforms", part)
    update = draw_update([(3, 4), (5,)], [torch.float32] * 2, 0)
    _, memory = transform.encode(update, {}, 0)
    _, after = transform.encode({"layer.1": update["layer.1"]}, memory, 1)
    assert set(memory) == set(after) == (set(update) if remembers(part) else set())
    assert not memory or torch.equal(after["layer.0"], memory["layer.0"])


@pytest.mark.parametrize("part", [part for part in PARTS if moves(part)], ids=str)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), 3e38])
def test_what_is_not_finite_is_refused_and_spoils_no_later_round(part, value):
    transform = make("transforms", part)
    # At every place, since not every codec sends all of them.
    bad = {"x": torch.full((5,), value)}
    wire, memory = transform.encode(bad, {}, 0)
    with pytest.raises(Refused):
        transform.decode(wire, bad)
    good = {"x": torch.tensor([1.0, 2.0, 3.0, -2.0, 0.5])}
    for number in range(3):
        wire, memory = transform.encode(good, memory, number)
        if value != 3e38:
            transform.decode(wire, good)
        assert all(bool(each.isfinite().all()) for each in memory.values())


HOSTILE = [float("nan"), float("inf"), -float("inf"), 3e38, 1e30, -1.0, 0.0, 2.0**31, 7.0]


def spoiled(value, how, draw):
    """A part of a message as a hostile silo would have it."""
    if how == "dtype":
        return value.to(torch.float64)
    if how == "shape":
        return value.flatten()[: draw(st.integers(0, value.numel() - 1))]
    if value.is_floating_point():
        numbers = st.sampled_from(HOSTILE)
    else:
        numbers = st.integers(torch.iinfo(value.dtype).min, torch.iinfo(value.dtype).max)
    drawn = torch.tensor(draw(st.lists(numbers, min_size=1, max_size=5)))
    return drawn.repeat(value.numel())[: value.numel()].view_as(value).to(value.dtype)


@settings(deadline=None, max_examples=200)
@given(st.sampled_from([part for part in PARTS if moves(part)]), st.data())
def test_whatever_a_silo_sends_is_refused_or_becomes_a_finite_update(part, data):
    transform = make("transforms", part)
    update = draw_update([(5, 7), (3,)], [torch.float32] * 2, 0)
    wire = dict(transform.encode(update, {}, 0)[0])
    for name in data.draw(st.lists(st.sampled_from(sorted(wire)), min_size=1, max_size=2, unique=True)):
        wire[name] = spoiled(wire[name], data.draw(st.sampled_from(["values", "dtype", "shape"])), data.draw)
    for name in data.draw(st.lists(st.sampled_from(sorted(wire)), max_size=1)):
        wire[data.draw(st.sampled_from(["more", name]))] = wire.pop(name)
    try:
        found = transform.decode(wire, update)
    except Refused:
        return
    require_like(found, update)
