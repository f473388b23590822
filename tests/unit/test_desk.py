"""The site's desk: what it is asked it answers, does once, writes down, and never falls over what a peer sends."""

from __future__ import annotations

import json
import os
import signal
import threading
import time

import psutil
import pytest
import torch

import fedllm
from fedllm.app.catalog import CATALOG
from fedllm.core.errors import FedllmError
from fedllm.core.types import Request
from fedllm.federation.site.desk import Desk
from fedllm.runtime.remote import remote
from tests.desks import (
    PAYLOAD,
    WORKER,
    ask,
    at_work,
    begin,
    desk_in,
    fetch,
    finish,
    key_of,
    log_of,
    recipe,
    request,
    say,
    scalars,
    send,
    site_in,
)
from tests.fake_site import line_to
from tests.messages import unpack_reply


def test_a_round_is_asked_sent_done_and_fetched(desk, tmp_path):
    assert ask(desk) == {"allowed": True, "reasons": []}
    assert send(desk) == {"have": len(PAYLOAD)}
    done = finish(desk, tokens=7)
    assert done["state"] == "done"
    reply = unpack_reply(fetch(desk, done))
    assert (reply.client, reply.round, reply.weight) == ("a", 0, 3.0) and reply.tensors["x"].tolist() == [1.0]
    assert reply.scalars["tokens"] == 7 and reply.scalars["train_loss"] == 2
    whole = fetch(desk, done)
    for offset in (0, 1, 100, done["size"], 1 << 40):
        assert say(desk, "get", run="r1", key=done["key"], offset=offset, length=60)[1] == whole[offset : offset + 60]
    kept = {path.suffix for path in (tmp_path / "state" / "runs" / "r1").iterdir()}
    assert kept == {".json", ".reply", ".memory", ".request"}


def test_a_request_said_again_is_answered_from_record_and_trained_once(desk, tmp_path):
    done = finish(desk)
    assert begin(desk)[0] == finish(desk) == done
    assert len(log_of(tmp_path, "begin")) == 1
    name = begin(desk)[1]
    assert say(desk, "wait", run="r1", id=name, seconds=0) == done


def test_another_request_for_a_round_is_refused_during_the_work_and_after_it(desk, tmp_path):
    answer, name = begin(desk, slow=0.3)
    assert answer == {"state": "running"}
    assert begin(desk, slow=0.4)[0]["rule"] == "once"
    assert begin(desk, data=b"other tensors")[0]["rule"] == "once"
    assert begin(desk, slow=0.3)[0] == {"state": "running"}
    assert say(desk, "wait", run="r1", id=name, seconds=10)["state"] == "done"
    assert begin(desk, slow=0.4)[0]["rule"] == "once"
    assert len(log_of(tmp_path, "begin")) == 1 and len(log_of(tmp_path, "refuse")) == 3


def test_many_threads_that_begin_the_same_train_it_once(desk, tmp_path):
    found = []
    threads = [threading.Thread(target=lambda: found.append(finish(desk, slow=0.1))) for _ in range(12)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 12 and all(each == found[0] for each in found) and found[0]["state"] == "done"
    assert len(log_of(tmp_path, "begin")) == 1


def test_other_work_in_the_same_round_with_the_same_tensors_is_not_mixed_up(desk):
    keys = {finish(desk, 0, op, base=base)["key"] for op in ("evaluate", "open") for base in (0.0, 1.0)}
    assert len(keys) == 1  # The same answers.
    assert [finish(desk, 0, "train")["state"], finish(desk, 0, "evaluate", lie=1)["state"]] == ["done", "failed"]


def test_each_round_has_the_memory_of_the_trained_round_before(desk):
    assert [scalars(desk, finish(desk, number))["memory"] for number in (0, 1, 5)] == [0, 1, 2]
    # A silo is looked at with what it keeps of its own, which no look changes.
    assert [scalars(desk, finish(desk, number, "evaluate"))["memory"] for number in (5, 6, 7)] == [2, 3, 3]
    assert scalars(desk, finish(desk, 6, "alone"))["memory"] == 0


def test_a_restart_answers_from_record_and_knows_no_unfinished_work(tmp_path):
    with desk_in(tmp_path) as desk:
        ask(desk)
        done = finish(desk)
        boot = say(desk, "ping")["boot"]
        _, name = begin(desk, 1, slow=30)
    with desk_in(tmp_path) as desk:
        assert say(desk, "ping")["boot"] != boot
        assert say(desk, "wait", run="r1", id=name, seconds=0) == {"state": "unknown"}
        assert finish(desk) == done and fetch(desk, done)
        assert scalars(desk, finish(desk, 1))["memory"] == 1
    assert [entry["round"] for entry in log_of(tmp_path, "begin")] == [0, 1, 1]
    assert not list((tmp_path / "state" / "runs" / "r1").glob(".*"))


def test_a_worker_that_dies_is_one_failed_reply_and_the_same_request_is_then_done(desk, tmp_path):
    first = scalars(desk, finish(desk))["pid"]
    _, name = begin(desk, 1, slow=1)
    at_work(desk)
    os.kill(int(first), signal.SIGKILL)
    begun = time.monotonic()
    failed = say(desk, "wait", run="r1", id=name, seconds=10)
    assert failed == {"state": "failed", "error": "the site's worker died (signal 9)"}
    assert time.monotonic() - begun < 0.9
    second = scalars(desk, finish(desk, 1, slow=1))
    assert second["pid"] != first and second["memory"] == 1
    assert log_of(tmp_path, "failed")[0]["why"] == "the site's worker died (signal 9)"


@pytest.mark.parametrize("how", [{"die": 1}, {"garbage": 1}, {"fail": 1}, {"lie": 1}, {"no_reply": 1}])
def test_whatever_the_worker_does_is_a_failed_reply_and_leaves_nothing(desk, tmp_path, how):
    before = sorted((tmp_path / "state" / "runs" / "r1").iterdir())
    failed = finish(desk, **how)
    assert failed["state"] == "failed" and failed["error"]
    assert sorted((tmp_path / "state" / "runs" / "r1").iterdir()) == before
    # Nothing left the site for the request that failed, so there may be another one.
    assert finish(desk)["state"] == "done"


def test_a_ping_is_answered_at_once_while_work_is_done(desk):
    begin(desk, 2, slow=30, tokens=5, loss=1.5)
    at_work(desk)
    begun = time.monotonic()
    said = say(desk, "ping")
    assert time.monotonic() - begun < 1
    progress = {"round": 2, "op": "train", "step": 1, "steps": 2, "seconds": 0.5, "tokens": 5, "loss": 1.5}
    assert said["work"] == {"r1": progress} and said["fedllm"] == fedllm.__version__
    assert say(desk, "stop", run="r1") == {"stopped": True}


def test_a_stop_ends_the_work_and_what_waits_of_that_run_only(desk, tmp_path):
    ask(desk, "r2")
    begin(desk, 0, slow=30)
    _, waiting = begin(desk, 1)
    _, other = begin(desk, 0, run="r2")
    assert say(desk, "stop", run="r3") == {"stopped": False}
    begun = time.monotonic()
    assert say(desk, "stop", run="r1") == {"stopped": True}
    assert time.monotonic() - begun < 5
    assert say(desk, "wait", run="r1", id=waiting, seconds=0)["error"] == "it was stopped"
    assert say(desk, "wait", run="r2", id=other, seconds=10)["state"] == "done"
    assert say(desk, "ping")["work"] == {} and len(log_of(tmp_path, "stop")) == 1
    assert finish(desk, 1)["state"] == "done"


def test_closing_ends_the_worker_and_frees_the_site(tmp_path):
    with desk_in(tmp_path) as desk:
        ask(desk)
        pid = int(scalars(desk, finish(desk))["pid"])
        with pytest.raises(FedllmError, match="Another site daemon works in"):
            desk_in(tmp_path)
    assert not psutil.pid_exists(pid)
    desk_in(tmp_path).close()
    assert [entry["what"] for entry in log_of(tmp_path)][-2:] == ["start", "end"]


def test_a_changed_audit_log_keeps_the_desk_closed(tmp_path):
    desk_in(tmp_path).close()
    path = tmp_path / "state" / "audit.jsonl"
    path.write_bytes(path.read_bytes().replace(b"start", b"smart"))
    for _ in range(2):
        with pytest.raises(FedllmError, match="changed at line 1"):
            desk_in(tmp_path)


def test_only_allowed_metrics_leave(tmp_path):
    with desk_in(tmp_path, metrics=("tokens",)) as desk:
        ask(desk)
        begin(desk, slow=0.2, loss=1.5, tokens=5)
        at_work(desk)
        assert "loss" not in say(desk, "ping")["work"]["r1"]
        done = finish(desk, slow=0.2, loss=1.5, tokens=5)
        assert scalars(desk, done) == {"tokens": 5.0}
        assert unpack_reply(fetch(desk, done)).tensors["x"].tolist() == [1.0]
    assert log_of(tmp_path, "reply")[0]["scalars"] == ["tokens"]


def test_a_run_that_was_not_asked_for_gets_nothing(desk, tmp_path):
    key = key_of(PAYLOAD)
    assert say(desk, "put", PAYLOAD, run="r9", key=key, offset=0, size=len(PAYLOAD))["rule"] == "ask"
    assert say(desk, "begin", run="r9", key=key, request=request())["rule"] == "ask"
    assert say(desk, "get", run="r9", key=key, offset=0, length=1)[0]["rule"] == "ask"
    assert not (tmp_path / "state" / "runs" / "r9").exists() and not list((tmp_path / "state" / "spool").iterdir())


def test_replies_are_for_their_run_only(desk):
    done = finish(desk)
    ask(desk, "r2")
    assert "no reply with the key" in say(desk, "get", run="r2", key=done["key"], offset=0, length=9)[0]["error"]


def test_a_refusal_names_the_rule_before_anything_is_touched(tmp_path):
    with desk_in(tmp_path, users=("eve@example.org",), secure_aggregation=True) as desk:
        no = ask(desk)
        assert no["allowed"] is False and no["rule"] == "users" and "eve@example.org" in no["error"]
        assert len(no["reasons"]) == 2
        assert begin(desk)[0]["rule"] == "ask"
        assert not (tmp_path / "state" / "worker.log").exists()
    refused = log_of(tmp_path, "refuse")
    assert [entry["rule"] for entry in refused[:2]] == ["users", "secure_aggregation"]
    assert refused[0]["user"] == "admin@example.org" and refused[0]["run"] == "r1"


def test_a_run_keeps_its_recipe_and_the_policy_of_today_counts(desk, tmp_path):
    assert ask(desk, recipe=recipe(seed=1))["rule"] == "ask"
    done = finish(desk)
    kept = json.loads((tmp_path / "state" / "runs" / "r1" / "recipe.json").read_bytes())
    assert kept == {"recipe": recipe(), "model_sha256": "0" * 64}
    desk.close()
    with desk_in(tmp_path, trainables=("full",)) as narrowed:
        assert begin(narrowed, 1)[0]["rule"] == "trainables"
        assert say(narrowed, "get", run="r1", key=done["key"], offset=0, length=1)[0]["rule"] == "trainables"
    # The fixture closes a desk, too.
    desk.__init__(site_in(tmp_path), WORKER, CATALOG)


def test_rounds_and_tokens_of_a_day_are_counted_over_restarts(tmp_path):
    limits = {"rounds_a_day": 2, "tokens_a_day": 100}
    with desk_in(tmp_path, **limits) as desk:
        ask(desk)
        assert finish(desk, 0, die=1, tokens=30)["state"] == "failed"
        assert finish(desk, 0, tokens=30)["state"] == "done"
        finish(desk, 1, tokens=30)
    with desk_in(tmp_path, **limits) as desk:
        ask(desk, "r2")
        no = begin(desk, 0, run="r2")[0]
        assert no["rule"] == "rounds_a_day" and "a trains 2 rounds within 24 hours, and 2 have begun" in no["error"]
        assert finish(desk, 1, "evaluate", tokens=10)["state"] == "done"
        no = begin(desk, 2, "evaluate")[0]
        assert no["rule"] == "tokens_a_day" and "100 tokens within 24 hours, and 100 were read" in no["error"]
        assert finish(desk, 1, tokens=30)["state"] == "done"  # From record, which costs nothing.


def test_tokens_that_only_the_site_may_know_count_too(tmp_path):
    with desk_in(tmp_path, tokens_a_day=100) as desk:
        ask(desk)
        begin(desk, 0, slow=30, read=100)
        at_work(desk)
        told = say(desk, "ping")["work"]["r1"]
        assert told == {"round": 0, "op": "train", "step": 1, "steps": 2, "seconds": 0.5}
        assert say(desk, "stop", run="r1") == {"stopped": True}
        assert "100 tokens within 24 hours, and 100 were read" in begin(desk, 0)[0]["error"]


def test_a_round_that_the_recipe_has_not_is_refused(desk):
    no = begin(desk, 100)[0]
    assert no["rule"] == "ask" and "asked for with 100 rounds; round 101 is none of them" in no["error"]


def test_a_round_done_long_ago_is_not_done_again(desk):
    for number in range(5):
        finish(desk, number)
    no = begin(desk, 0)[0]
    assert no["rule"] == "once" and "its reply is no longer kept" in no["error"]


def test_what_leaves_is_written_down_first_under_the_rules_that_let_it(tmp_path):
    with desk_in(tmp_path, rounds_a_run=100) as desk:
        ask(desk)
        done = finish(desk)
        say(desk, "get", run="r1", key=done["key"], offset=40, length=40)
        say(desk, "get", run="r1", key=done["key"], offset=80, length=40)
        (line,) = log_of(tmp_path, "get")
        assert (line["bytes"], line["run"], line["round"], line["op"]) == (done["size"], "r1", 0, "train")
        assert line["rule"] == "metrics, rounds_a_run"
        fetch(desk, done)
    assert [e["what"] for e in log_of(tmp_path)] == ["start", "ask", "begin", "reply", "get", "get", "end"]


def test_messages_that_are_too_large_or_not_there_are_said(tmp_path):
    with desk_in(tmp_path, max_message_mb=0.01) as desk:
        ask(desk)
        no = send(desk, b"x" * 10_001)
        assert no["rule"] == "max_message_mb" and "a takes messages of 0.01 MB at most" in no["error"]
        missing = say(desk, "begin", run="r1", key=key_of(b"none"), request=request())
        assert missing == {"state": "missing"}
        assert "smaller" not in finish(desk, data=b"x" * 10_000)


def test_too_much_work_at_once_is_refused(desk):
    begin(desk, 0, slow=30)
    answers = [begin(desk, 0, "evaluate", look=number)[0] for number in range(12)]
    assert answers[0] == {"state": "running"} and "wait here already" in answers[-1]["error"]


def test_what_waits_behind_other_work_of_its_run_goes_on_as_that_does(desk):
    begin(desk, 1, slow=30)
    at_work(desk)
    _, waiting = begin(desk, 1, "evaluate")
    said = say(desk, "wait", run="r1", id=waiting, seconds=0)
    assert said["state"] == "running" and (said["progress"]["op"], said["progress"]["step"]) == ("train", 1)


def test_a_reply_is_fetched_while_the_next_round_is_trained(desk):
    begin(desk, 0)
    begin(desk, 1, slow=30)
    done = finish(desk, 0)
    at_work(desk)
    assert scalars(desk, done)["memory"] == 0 and say(desk, "ping")["work"]["r1"]["round"] == 1


def test_the_exchange_of_a_server_over_desks(tmp_path):
    line_up = {name: Desk(site_in(tmp_path / name, name=name), WORKER, CATALOG) for name in ("a", "b")}
    for desk in line_up.values():
        ask(desk)
    notes = []
    exchange = remote(
        line_to(line_up),
        tmp_path / "server",
        run="r1",
        largest=1 << 20,
        note=lambda site, what: notes.append((site, what)),
        progress=lambda site, what: None,
    )
    tensors = {"x": torch.zeros(500_000)}
    for number, how in enumerate(({}, {"b": {"die": 1.0}}, {})):
        requests = [Request(name, number, "train", tensors, how.get(name, {})) for name in line_up]
        replies = {reply.client: reply for reply in exchange(requests)}
        assert replies.keys() == line_up.keys() - how.keys()
    assert replies["a"].scalars["memory"] == 2 and replies["b"].scalars["memory"] == 1
    assert notes == [("b", "the site's worker died (signal 9)")]
    for desk in line_up.values():
        desk.close()
