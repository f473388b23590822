"""Laws of every transform in the catalogue: shapes come back, inputs stay, the plan knows the bytes."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.app.catalog import CATALOG, make
from fedllm.core.aggregate import mean
from fedllm.core.plan import plan, size
from fedllm.core.round import averaging, wire_stages
from fedllm.core.tensors import require_like
from fedllm.core.types import Reply, Request, Silo, Work, on_meta

SETTINGS = {
    "clip": [{"max_norm": 0.5}, {"max_norm": 1e6}],
    "cast": [{}, {"dtype": "float16"}],
    "top_k": [{"fraction": 0.3}, {"fraction": 1.0}, {"fraction": 0.05, "error_feedback": False}],
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
    assert SETTINGS.keys() == CATALOG["transforms"].keys()


@EVERY
@settings(deadline=None, max_examples=40)
@given(LIKE)
def test_decoding_what_was_encoded_keeps_names_shapes_and_dtypes(part, like):
    transform = make("transforms", part)
    update, memory = draw_update(*like), {}
    for number in range(2):
        wire, memory = transform.encode(update, memory, number)
        require_like(transform.decode(wire, on_meta(update)), update)


@EVERY
@settings(deadline=None, max_examples=40)
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
@settings(deadline=None, max_examples=40)
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


CHAINS = st.lists(st.sampled_from(PARTS), max_size=3)


@settings(deadline=None, max_examples=60)
@given(CHAINS, SHAPES, st.integers(0, 2**32))
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


@settings(deadline=None, max_examples=60)
@given(st.sampled_from([0.1, 0.3, 0.7]), st.integers(1, 40), st.integers(1, 6), st.integers(0, 2**32))
def test_with_error_feedback_nothing_is_lost(fraction, width, rounds, seed):
    transform = make("transforms", {"name": "top_k", "fraction": fraction})
    draw = torch.Generator().manual_seed(seed)
    # Whole numbers, so that sums are exact.
    updates = [{"x": torch.randint(-100, 100, (width,), generator=draw).float()} for _ in range(rounds)]
    memory, sent = {}, torch.zeros(width)
    for update in updates:
        wire, memory = transform.encode(update, memory, 0)
        sent += transform.decode(wire, update)["x"]
    assert torch.equal(sent + memory["x"], sum(update["x"] for update in updates))
