"""Whatever one site of a federation answers, the round ends, the other sites' work counts, and no lie does."""

from __future__ import annotations

import gc
import hashlib
import json
import math
import os
import resource
import tempfile
import threading
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st

from fedllm.core.aggregate import mean
from fedllm.core.round import LARGEST_WEIGHT, averaging
from fedllm.core.tensors import require_like
from fedllm.core.types import Reply, Work
from fedllm.exchange.select import everyone
from fedllm.runtime import errand
from fedllm.runtime.line import Line
from fedllm.runtime.remote import remote
from tests.fake_site import RUN, stepping
from tests.messages import pack_reply

EXAMPLES = int(os.environ.get("FEDLLM_EXAMPLES", 100_000))
"""Answers that the slow test tries; `FEDLLM_EXAMPLES=1000000 pytest -m slow tests/laws/test_hostile_site.py`."""

SLICE = 4000

GOOD, EVIL, ROUND = "good", "evil", 3
LIKE = {"w": torch.ones(2, 3), "b": torch.ones(4, dtype=torch.bfloat16)}
HONEST = Reply(EVIL, ROUND, {"w": torch.full((2, 3), 0.5), "b": torch.full((4,), 0.25, dtype=torch.bfloat16)}, 2.0)
MESSAGE = pack_reply(HONEST)
LARGEST = 1 << 20


def desk(message, answers=None):
    """A site that has `message` as its reply to anything, and answers to what is in `answers` as it says there."""

    def answer(head, body):
        if head["do"] in (answers or {}):
            return answers[head["do"]]
        if head["do"] == "put":
            return {"have": head["size"]}, b""
        if head["do"] == "get":
            return {"size": len(message)}, message[head["offset"] :][: head["length"]]
        return {"state": "done", "key": hashlib.sha256(message).hexdigest(), "size": len(message)}, b""

    return answer


def a_round(evil, folder):
    """Run one round with an honest site and another; return the parameters, the report and the replies that counted."""
    desks = {GOOD: desk(pack_reply(HONEST._replace(client=GOOD))), EVIL: evil}
    line = Line(lambda site, head, body, seconds: desks[site](head, body), lambda: list(desks))
    exchange = remote(
        line,
        folder,
        run=RUN,
        patience=0.0,
        stall=0.0,
        largest=LARGEST,
        note=lambda site, said: None,
        progress=lambda site, what: None,
    )
    counted = []

    def add(total, update, weight):
        counted.append((update, weight))
        return mean().add(total, update, weight)

    algorithm = averaging(
        work=Work(stepping), select=everyone([GOOD, EVIL]), aggregate=mean()._replace(add=add), transforms=()
    )
    state, report = algorithm.server(algorithm.init(LIKE)._replace(round=ROUND), exchange)
    return state.params, report, counted


@contextmanager
def quick():
    """Waits that a test can afford, and a folder that is gone after it."""
    poll, errand.POLL = errand.POLL, 0.01
    try:
        with tempfile.TemporaryDirectory() as folder:
            yield Path(folder)
    finally:
        errand.POLL = poll


def without_evil(folder):
    return a_round(desk(b""), folder)[0]


def hold(evil, folder, honest_alone, lie):
    """What must be true whatever the site answers; a `lie` moreover must not count."""
    params, report, counted = a_round(evil, folder)
    assert report["clients"] == len(counted) in ((1,) if lie else (1, 2))
    for update, weight in counted:
        require_like(update, LIKE)
        assert 0 < weight <= LARGEST_WEIGHT
    assert all(bool(value.isfinite().all()) for value in params.values())
    assert all(math.isfinite(value) for value in report.values() if isinstance(value, float))
    if len(counted) == 1:
        assert all(torch.equal(params[name], honest_alone[name]) for name in LIKE)
        assert f"dropped.{EVIL}" in report
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 2 * LARGEST


TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=8,
)
BAD = st.sampled_from([math.nan, math.inf, -math.inf])
NUMBERS = BAD | st.sampled_from([0.0, -1.0, 1e300, -0.0, 2**53 + 2, -1e-300])


def header(text, body=b""):
    return len(text).to_bytes(8, "little") + text + body


def with_tensors(tensors):
    return pack_reply(HONEST._replace(tensors=tensors))


@st.composite
def spoilt(draw):
    """The honest update with one of its values not finite."""
    name = draw(st.sampled_from(list(LIKE)))
    value = HONEST.tensors[name].clone()
    value.view(-1)[draw(st.integers(0, value.numel() - 1))] = draw(BAD)
    return with_tensors({**HONEST.tensors, name: value})


@st.composite
def misshapen(draw):
    """The honest update with one of its tensors of another shape or dtype, gone, or beside one too many."""
    name, tensors = draw(st.sampled_from(list(LIKE))), dict(HONEST.tensors)
    shape = tuple(draw(st.lists(st.integers(0, 4), max_size=3)))
    dtype = draw(st.sampled_from([torch.float32, torch.bfloat16, torch.float64, torch.int8, torch.bool]))
    kind = draw(st.sampled_from(["gone", "more", "other", "renamed", "none"]))
    if kind == "gone":
        del tensors[name]
    elif kind == "none":
        tensors = {}
    elif kind == "renamed":
        tensors[draw(TEXT.filter(lambda text: text not in (name, "__metadata__")))] = tensors.pop(name)
    elif kind == "more" or (shape, dtype) == (LIKE[name].shape, LIKE[name].dtype):
        tensors[draw(TEXT.filter(lambda text: text not in (*LIKE, "__metadata__")))] = torch.ones(shape).to(dtype)
    else:
        tensors[name] = torch.ones(shape).to(dtype)
    return with_tensors(tensors)


@st.composite
def claiming(draw):
    """The honest message whose header says something else of one tensor than its bytes."""
    size = int.from_bytes(MESSAGE[:8], "little")
    listed = json.loads(MESSAGE[8 : 8 + size])
    entry = listed[draw(st.sampled_from(list(LIKE)))]
    number = st.sampled_from([-1, 0, 1, 7, 2**31, 2**40, 2**63 - 1, 2**64, 2**70])
    lie = {
        "shape": st.lists(number, max_size=4),
        "data_offsets": st.lists(number, max_size=3),
        "dtype": st.sampled_from(["F64", "F99", "F8_E4M3", "F4", "U64", "C64", "I8"]) | JSON,
    }
    key = draw(st.sampled_from(list(lie)))
    before, entry[key] = entry[key], draw(lie[key])
    if entry[key] == before:
        del entry[key]
    return header(json.dumps(listed).encode(), MESSAGE[8 + size :])


LIES = st.one_of(
    st.binary(max_size=200),
    st.integers(0, len(MESSAGE) - 1).map(lambda kept: MESSAGE[:kept]),
    st.binary(min_size=1, max_size=20).map(lambda more: MESSAGE + more),
    st.sampled_from([GOOD, "", "EVIL", "evil ", "../evil"]).map(lambda n: pack_reply(HONEST._replace(client=n))),
    st.integers(-(2**40), 2**40).filter(lambda n: n != ROUND).map(lambda n: pack_reply(HONEST._replace(round=n))),
    NUMBERS.map(lambda weight: pack_reply(HONEST._replace(weight=weight))),
    st.tuples(TEXT, BAD).map(lambda pair: pack_reply(HONEST._replace(scalars=dict([pair])))),
    st.sampled_from([2**20, 2**32, 2**63, 2**64 - 1]).map(lambda size: size.to_bytes(8, "little") + MESSAGE[8:]),
    spoilt(),
    misshapen(),
    claiming(),
).map(desk)
"""Sites whose transfers are whole and whose replies are lies."""

BYTES = (
    st.lists(st.tuples(st.integers(0, len(MESSAGE) - 1), st.integers(0, 255)), min_size=1, max_size=4)
    .map(lambda flips: bytes(dict(flips).get(place, byte) for place, byte in enumerate(MESSAGE)))
    .map(desk)
)
"""Sites whose reply has a few bytes changed; some of them are replies still."""

HEADS = st.dictionaries(st.sampled_from(["have", "state", "key", "size", "error", "rule", "progress"]) | TEXT, JSON)
STATES = st.fixed_dictionaries(
    {"state": st.sampled_from(["running", "done", "missing", "unknown", "failed"]) | JSON},
    optional={"key": st.just("0" * 64) | JSON, "size": st.integers(-2, 2**70), "progress": JSON, "error": JSON},
)
ANSWERS = st.dictionaries(
    st.sampled_from(["put", "begin", "wait", "get"]),
    st.tuples(HEADS | STATES | st.fixed_dictionaries({"have": st.integers()}), st.binary(max_size=64)),
    min_size=1,
).map(lambda answers: desk(MESSAGE, answers))
"""Sites that answer anything to anything."""

SITES = st.one_of(
    LIES.map(lambda site: (site, True)), BYTES.map(lambda site: (site, False)), ANSWERS.map(lambda site: (site, False))
)


def try_all(examples):
    with quick() as folder:
        alone = without_evil(folder)
        others = threading.active_count()
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        # What hypothesis remembers of its examples grows with them, so each some thousand are a search of their own.
        for part in range(math.ceil(examples / SLICE)):

            @seed(part)
            @settings(
                max_examples=min(SLICE, examples - part * SLICE),
                deadline=None,
                database=None,
                suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much],
            )
            @given(SITES)
            def check(site):
                hold(site[0], folder, alone, lie=site[1])

            check()
            gc.collect()
            assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 200_000
            assert threading.active_count() <= others + 1


def test_no_lie_counts_and_none_does_harm():
    try_all(300)


@pytest.mark.slow
def test_no_lie_of_very_many_counts_and_none_does_harm():
    try_all(EXAMPLES)


def test_the_honest_reply_does_count():
    with quick() as folder:
        _, report, counted = a_round(desk(MESSAGE), folder)
    assert report["clients"] == len(counted) == 2


@pytest.mark.parametrize("value", [1e38, -3e38, 1e30])
def test_a_value_that_no_training_gives_does_not_count(value):
    with quick() as folder:
        hold(
            desk(with_tensors({**HONEST.tensors, "w": torch.full((2, 3), value)})),
            folder,
            without_evil(folder),
            lie=True,
        )


def test_a_round_that_is_over_cannot_be_answered_again():
    with quick() as folder:
        old = pack_reply(HONEST._replace(round=ROUND - 1))
        hold(desk(old), folder, without_evil(folder), lie=True)


def test_a_reply_that_grows_while_it_is_fetched_is_cut_off():
    with quick() as folder:
        endless = desk(MESSAGE, {"get": ({"size": len(MESSAGE)}, MESSAGE + b"\0" * (4 * LARGEST))})
        hold(endless, folder, without_evil(folder), lie=True)
