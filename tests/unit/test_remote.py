"""What the exchange over a line does with sites that fail, lie, or are slow; the laws it shares are in tests/laws."""

from __future__ import annotations

import threading
import time
import weakref

import pytest
import torch

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import LATE, Aside, Request
from fedllm.runtime import remote as runtime_remote
from fedllm.runtime.errand import promised, request_id, shown
from fedllm.runtime.line import Aborted
from fedllm.runtime.remote import remote
from tests.fake_site import (
    RUN,
    FakeSite,
    aborting,
    at,
    line_to,
    lying,
    same,
    slow,
    stepping,
    twice,
    unanswered,
    unreachable,
)

NAMES = ["a", "bb", "ccc"]
TENSORS = {"x": torch.arange(6.0).view(2, 3), "y": torch.ones(2, dtype=torch.bfloat16)}


def asked(names=NAMES, number=0, op="train", tensors=TENSORS):
    return [Request(name, number, op, tensors, {"lr": 0.5}) for name in names]


class Federation:
    """Fake sites, an exchange with them, and what it said."""

    def __init__(self, folder, faults=None, client=stepping, **options):
        self.sites = {name: FakeSite(name, client, folder / "sites" / name) for name in NAMES}
        self.faults, self.notes, self.told = dict(faults or {}), [], []
        self.spool = folder / "spool"
        options = {"patience": 0.3, "largest": 1 << 20} | options
        self.exchange = remote(
            line_to(self.sites, self.faults),
            self.spool,
            run=RUN,
            note=lambda *said: self.notes.append(said),
            progress=lambda *said: self.told.append(said),
            **options,
        )

    def ask(self, *args, **options):
        return {reply.client: reply for reply in self.exchange(asked(*args, **options))}


@pytest.fixture
def made(tmp_path):
    return lambda *args, **options: Federation(tmp_path, *args, **options)


def sentence(federation, name):
    """The one thing that was noted, of that site."""
    ((site, said),) = federation.notes
    assert site == name
    return said


def test_the_files_on_their_way_are_gone_when_all_have_answered(made):
    federation = made()
    assert set(federation.ask()) == set(NAMES)
    assert list(federation.spool.iterdir()) == [] and federation.notes == []


def test_a_reply_of_a_large_model_stays_in_a_file_that_has_no_name(made, monkeypatch):
    federation = made(parallel=1)
    small = federation.ask()
    monkeypatch.setattr(runtime_remote, "LARGE", 0)
    large = federation.ask()
    assert all(isinstance(reply.tensors, Aside) for reply in large.values())
    assert not any(isinstance(reply.tensors, Aside) for reply in small.values())
    # One place on the spool was enough for all three: it is given back while a reply waits.
    assert list(federation.spool.iterdir()) == []
    assert all(same(large[name], small[name]) for name in NAMES)


def test_a_second_op_with_the_same_tensors_uploads_nothing(made):
    federation = made()
    federation.ask(op="evaluate")
    federation.ask(op="train")
    assert all(site.seen["put"] == 1 and len(site.ran) == 2 for site in federation.sites.values())


def test_the_same_request_gets_the_recorded_reply(made):
    federation = made()
    first, again = federation.ask(), federation.ask()
    assert all(same(first[name], again[name]) for name in NAMES)
    assert all(len(site.ran) == 1 for site in federation.sites.values())
    assert not same(first["a"], federation.ask(number=1)["a"]._replace(round=0))


def test_a_site_begins_what_comes_next_before_its_reply_is_fetched_and_is_not_asked_to_train_it_twice(made):
    said = []

    def listening(pass_on, head, body, seconds):
        said.append((head["do"], head.get("request", {}).get("round")))
        return pass_on(head, body)

    federation = made({"a": listening})
    first, second = asked(["a"]), asked(["a"], number=1, tensors={"x": torch.zeros(3)})
    list(federation.exchange([first[0]._replace(then=second[0])]))
    assert said.index(("begin", 1)) < said.index(("get", None))
    (reply,) = federation.exchange(second)
    assert reply.round == 1 and len(federation.sites["a"].ran) == 2 and federation.notes == []


def test_a_site_that_may_not_begin_what_comes_next_is_asked_in_its_turn(made):
    def denying(pass_on, head, body, seconds):
        early = head["do"] == "begin" and head["request"]["round"] == 1 and not turn
        return ({"error": "no more today", "rule": "rounds_a_day"}, b"") if early else pass_on(head, body)

    turn, federation = [], made({"a": denying})
    first, second = asked(["a"]), asked(["a"], number=1)
    assert [each.round for each in federation.exchange([first[0]._replace(then=second[0])])] == [0]
    turn.append(1)
    assert [each.round for each in federation.exchange(second)] == [1] and federation.notes == []


@pytest.mark.parametrize("fault", [twice, unanswered(at({1, 3, 4})), unreachable(at({0, 2, 3}))])
def test_lost_and_doubled_calls_do_not_show(made, fault):
    federation = made({"bb": fault})
    assert set(federation.ask()) == set(NAMES) and federation.notes == []
    assert len(federation.sites["bb"].ran) == 1


def test_a_dead_site_is_noted_after_the_patience_and_the_others_do_not_wait(made):
    federation, came = made({"bb": unreachable(lambda head: True)}, patience=0.6), []
    begun = time.monotonic()
    for reply in federation.exchange(asked()):
        came.append((reply.client, time.monotonic() - begun))
    assert {name for name, _ in came} == {"a", "ccc"} and all(seconds < 0.5 for _, seconds in came)
    assert "nothing moved for" in sentence(federation, "bb")
    assert 0.6 < time.monotonic() - begun < 2.0


def test_a_lost_site_is_asked_once_and_taken_back_when_it_answers(made):
    federation = made({"bb": unreachable(lambda head: True)}, patience=0.6)
    federation.ask()
    begun = time.monotonic()
    assert set(federation.ask(number=1)) == {"a", "ccc"}
    assert time.monotonic() - begun < 0.4 and len(federation.notes) == 2
    federation.faults.clear()
    assert set(federation.ask(number=2)) == set(NAMES)


def test_a_site_that_the_engine_does_not_know_is_noted_at_once(made):
    federation = made(patience=60)
    assert set(federation.ask(["a", "zz"])) == {"a"}
    assert "not among the sites" in sentence(federation, "zz")


def test_work_that_fails_is_noted_in_the_sites_words(made):
    def client(request, own):
        if own.name == "bb":
            raise ValueError("no room\n\x1b[2Jleft")
        return stepping(request, own)

    federation = made(client=client)
    assert set(federation.ask()) == {"a", "ccc"}
    assert sentence(federation, "bb") == "no room  [2Jleft"


def test_a_refusal_names_the_rule(made):
    refusal = lying("begin", lambda head, body: ({"error": "not today", "rule": "rounds_a_day"}, b""))
    federation = made({"a": refusal})
    assert set(federation.ask()) == {"bb", "ccc"}
    assert sentence(federation, "a") == "not today (rule 'rounds_a_day')"


def test_an_abort_ends_the_exchange_at_once(made):
    federation = made({"bb": aborting(at({1})), "ccc": unreachable(lambda head: True)}, patience=30)
    before, begun = threading.active_count(), time.monotonic()
    with pytest.raises(Aborted):
        federation.ask()
    assert time.monotonic() - begun < 1.0
    assert gone(before)


def test_an_error_of_this_machine_is_not_taken_for_a_sites(made):
    def broken(*args):
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        made({"a": broken}).ask()


def test_a_spool_that_cannot_be_written_is_one_sentence(made):
    federation = made()
    federation.spool.write_text("a file")
    with pytest.raises(FedllmError, match="cannot be written"):
        federation.ask()


def gone(threads, seconds=3.0):
    end = time.monotonic() + seconds
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.02)
    return threading.active_count() <= threads


def test_closing_the_exchange_stops_its_threads(made):
    federation = made({"ccc": slow(0.2), "bb": unreachable(lambda head: True)}, patience=60)
    before = threading.active_count()
    replies = federation.exchange(asked())
    assert next(replies).client == "a"
    replies.close()
    assert gone(before)


def test_an_engine_that_keeps_a_call_is_not_waited_for(made, monkeypatch):
    monkeypatch.setattr(runtime_remote, "GRACE", -14.5)
    free = threading.Event()

    def stuck(pass_on, head, body, seconds):
        free.wait(10)
        return pass_on(head, body)

    with pytest.raises(Aborted, match="does not come back"):
        made({"a": stuck}).ask()
    free.set()


def test_more_sites_than_may_send_at_once_all_work_at_once(made):
    meet = threading.Barrier(len(NAMES), timeout=5)

    def client(request, own):
        meet.wait()
        return stepping(request, own)

    federation = made(client=client, parallel=1)
    assert set(federation.ask()) == set(NAMES)


def test_no_more_sites_send_at_once_than_may(made):
    busy, most = [], []

    def fault(pass_on, head, body, seconds):
        if head["do"] not in ("put", "get"):
            return pass_on(head, body)
        busy.append(head)
        most.append(len(busy))
        time.sleep(0.05)
        busy.pop()
        return pass_on(head, body)

    assert set(made(dict.fromkeys(NAMES, fault), parallel=1).ask()) == set(NAMES)
    assert max(most) == 1


def test_work_that_makes_no_step_is_given_up_and_work_that_does_is_not(made):
    def pretend(steps):
        states = iter(steps)
        return lambda head, body: ({"state": "running", "progress": {"step": next(states)}}, b"")

    federation = made({"a": lying("wait", pretend(iter([1] * 100)))}, stall=0.8, client=late(0.2), patience=60)
    assert set(federation.ask()) == {"bb", "ccc"}
    assert "no step for 0.8 s" in sentence(federation, "a")


def late(seconds):
    def client(request, own):
        time.sleep(seconds)
        return stepping(request, own)

    return client


def test_work_longer_than_the_patience_is_waited_for(made, monkeypatch):
    monkeypatch.setattr("fedllm.runtime.errand.POLL", 0.05)
    assert set(made(client=late(1.0), patience=0.2, stall=1.5).ask()) == set(NAMES)


def test_work_that_is_not_done_at_the_deadline_is_late_and_the_site_is_asked_again(made, monkeypatch):
    monkeypatch.setattr("fedllm.runtime.errand.POLL", 0.05)
    slow = {"a": 0}

    def client(request, own):
        time.sleep(1.5 if request.round == slow.get(request.client) else 0.0)
        return stepping(request, own)

    federation = made(client=client, deadline=lambda request: 0.5 if request.op == "train" else 60.0)
    assert set(federation.ask()) == {"bb", "ccc"}
    ((site, why),) = federation.notes
    assert site == "a" and why.startswith(LATE) and "after 0.5 s" in why
    time.sleep(1.5)
    assert set(federation.ask(number=1)) == set(NAMES)


def test_a_site_that_restarts_is_asked_again(made):
    federation = made(client=late(0.3))
    site, first = federation.sites["a"], [True]

    def restart(pass_on, head, body, seconds):
        if head["do"] == "wait" and first:
            first.clear()
            site.forget()
        return pass_on(head, body)

    federation.faults["a"] = restart
    assert set(federation.ask()) == set(NAMES) and len(site.ran) == 2


@pytest.mark.parametrize("state", ["missing", "unknown"])
def test_a_site_that_loses_everything_again_and_again_is_given_up(made, state):
    federation = made({"a": lying("begin", lambda head, body: ({"state": state}, b""))}, patience=60)
    assert set(federation.ask()) == {"bb", "ccc"}
    assert "lost the request 10 times" in sentence(federation, "a")


@pytest.mark.parametrize(
    "change",
    [
        lambda reply: reply._replace(client="bb"),
        lambda reply: reply._replace(round=7),
        lambda reply: reply._replace(client="x" * 10**5),
    ],
)
def test_a_reply_to_something_else_is_noted(made, change):
    def client(request, own):
        reply, memory = stepping(request, own)
        return (change(reply) if own.name == "a" else reply), memory

    federation = made(client=client)
    assert set(federation.ask()) == {"bb", "ccc"}
    assert "it answers for" in sentence(federation, "a") and len(sentence(federation, "a")) < 400


def test_a_reply_larger_than_it_may_be_is_refused_before_a_byte_of_it_comes(made):
    federation = made(largest=lambda request: 10 if request.client == "a" else 1 << 20)
    assert set(federation.ask()) == {"bb", "ccc"}
    assert "more than the 10" in sentence(federation, "a") and federation.sites["a"].seen["get"] == 0


def test_a_reply_belongs_to_its_reader_alone(made):
    alive = weakref.WeakSet()
    replies = made().exchange(asked())
    while (reply := next(replies, None)) is not None:
        alive.add(reply.tensors["x"])
        del reply
        assert len(alive) == 0


def test_progress_shows_states_numbers_and_bytes(made, monkeypatch):
    monkeypatch.setattr("fedllm.runtime.errand.POLL", 0.05)
    federation = made(client=late(0.2))
    federation.ask(number=3)
    states = [what["state"] for name, what in federation.told if name == "a"]
    assert states[0] == "sending" and states[-1] == "done" and {"working", "fetching"} <= set(states)
    working = next(what for name, what in federation.told if what["state"] == "working")
    assert (working["round"], working["op"], working["step"], working["steps"], working["tokens"]) == (
        3,
        "train",
        1.0,
        2.0,
        3.0,
    )
    sent = [what["bytes_down"] for name, what in federation.told if name == "a"]
    assert sent == sorted(sent) and sent[0] > 0


def test_only_finite_numbers_are_shown():
    assert shown({"step": 1, "loss": float("nan"), "tokens": "9", "seconds": [], "x": 5}) == {
        "step": 1.0,
        "tokens": 9.0,
    }
    assert shown(None) == shown([1]) == {}


@pytest.mark.parametrize(
    "said", [{}, {"key": 5, "size": 5}, {"key": "../../etc/passwd", "size": 5}, {"key": "A" * 64, "size": 5}]
)
def test_a_key_that_is_no_sha256_is_refused(said):
    with pytest.raises(Refused):
        promised(said, 10)


def test_a_request_is_known_by_its_tensors_and_its_head_whatever_their_order():
    head = {"client": "a", "round": 1, "op": "train", "scalars": {"lr": 0.1}}
    name = request_id("0" * 64, head)
    assert name == request_id("0" * 64, dict(reversed(head.items())))
    others = [request_id("1" * 64, head)] + [request_id("0" * 64, {**head, key: 2}) for key in head]
    assert len({name, *others}) == 6
