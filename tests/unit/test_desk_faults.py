"""The desk under faults: killed at any instant, its disk full, a peer that sends whatever it likes."""

from __future__ import annotations

import json
import multiprocessing
import resource
import time
from contextlib import contextmanager

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.app.catalog import CATALOG
from fedllm.federation.site.desk import Desk
from fedllm.federation.site.record import markers
from fedllm.runtime.line import decode, encode
from tests.desks import (
    PAYLOAD,
    WORKER,
    ask,
    desk_in,
    fetch,
    finish,
    key_of,
    log_of,
    recipe,
    request,
    scalars,
    send,
    site_in,
)


def train_until_killed(folder):
    with desk_in(folder) as desk:
        ask(desk)
        done = len(list((folder / "state" / "runs" / "r1").glob("*.request")))
        for number in range(max(0, done - 1), 100):
            fetch(desk, finish(desk, number))


def test_killed_at_any_instant_a_site_goes_on_with_each_round_done_once(tmp_path):
    run = tmp_path / "state" / "runs" / "r1"
    for attempt in range(12):
        before = len(list(run.glob("*.request")))
        child = multiprocessing.get_context("fork").Process(target=train_until_killed, args=(tmp_path,))
        child.start()
        while len(list(run.glob("*.request"))) == before:
            time.sleep(0.001)
        time.sleep(0.003 * attempt)
        child.kill()
        child.join()
    with desk_in(tmp_path) as desk:
        ask(desk)
        last = next(markers(run, "train-*")).round
        assert last >= 11
        # The memory is one more for every round that was trained and recorded.
        assert scalars(desk, finish(desk, last))["memory"] == last
        assert scalars(desk, finish(desk, last + 1))["memory"] == last + 1


@contextmanager
def files_of_at_most(size):
    """No file of this process can grow beyond so many bytes: as if the disk were full."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_sentence_and_the_site_goes_on_when_there_is_room(desk, tmp_path):
    send(desk)
    finish(desk, op="open")
    with files_of_at_most(1000):
        answers = [send(desk, b"x" * 2000), finish(desk), ask(desk, "r2")]
    for answer in answers:
        assert "cannot write" in answer["error"] and "(File too large); make room at the site" in answer["error"]
    assert not (tmp_path / "state" / "runs" / "r2" / "asked.json").exists()
    assert finish(desk)["state"] == "done" and len(log_of(tmp_path, "begin")) == 2


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile") / "site"
    with Desk(site_in(folder), WORKER, CATALOG) as desk:
        ask(desk)
        yield folder, desk


WORDS = st.sampled_from(
    ["r1", "a", "..", "../../x", "/etc/x", "", "con", "a\n", "é", "0" * 64, key_of(PAYLOAD), "x" * 99]
)
NUMBERS = st.sampled_from([0, 1, -1, 16 << 20, 1 << 63, 10**400, 1.5, float("nan"), float("inf"), True])
ANY = st.recursive(
    WORDS | NUMBERS | st.none(), lambda i: st.lists(i, max_size=3) | st.dictionaries(WORDS, i, max_size=3)
)
REQUESTS = st.fixed_dictionaries({key: st.just(value) | ANY for key, value in request().items()})
HEADS = st.fixed_dictionaries(
    {"do": st.sampled_from(["ping", "ask", "put", "begin", "wait", "get", "stop", "close", "__init__"]) | ANY},
    optional={
        "run": st.just("r1") | ANY,
        "key": st.just(key_of(PAYLOAD)) | ANY,
        "id": st.just(key_of(PAYLOAD)) | ANY,
        "request": REQUESTS | ANY,
        "recipe": ANY,
        **{key: NUMBERS | ANY for key in ("offset", "size", "length")},
        "seconds": st.sampled_from([0, -1, float("nan"), "x", None]),
        **{key: ANY for key in ("user", "fedllm", "model_sha256", "algorithm")},
    },
)


def outside(folder):
    return sorted(path for path in folder.parent.rglob("*") if folder / "state" not in path.parents)


@settings(max_examples=400, deadline=None)
@given(head=HEADS, body=st.sampled_from([b"", PAYLOAD[:100], PAYLOAD]))
def test_no_head_brings_the_desk_down_or_writes_elsewhere(target, head, body):
    folder, desk = target
    before = outside(folder)
    text = json.dumps(head).encode()
    answer, _ = decode(desk.answer(len(text).to_bytes(4, "big") + text + body))
    assert isinstance(answer, dict) and isinstance(answer.get("error", ""), str)
    assert outside(folder) == before
    state = {path.name for path in (folder / "state").iterdir()}
    assert state <= {"audit.jsonl", "lock", "runs", "spool", "worker.log"}
    assert {path.name for path in (folder / "state" / "runs").iterdir()} <= {"r1"}


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=200) | st.builds(lambda b: len(b).to_bytes(4, "big") + b, st.binary(max_size=50)))
def test_no_bytes_bring_the_desk_down(target, data):
    assert decode(target[1].answer(data))[0]["error"]


def test_deep_and_large_heads_are_only_refused(target):
    for text in (
        b"[" * 500_000,
        b'{"do":' * 100_000,
        b'{"a":' + b"[" * 900 + b"]" * 900 + b"}",
        b"{}" + b" " * 2_000_000,
    ):
        assert decode(target[1].answer(len(text).to_bytes(4, "big") + text))[0]["error"]
    deep = recipe(task={"name": "instruct", "x": 1})
    for _ in range(800):
        deep = {"rounds": 1, "transforms": [], "x": deep}
    assert decode(target[1].answer(encode({"do": "ask", "run": "deep", "recipe": deep, "algorithm": []})))[0]["error"]
