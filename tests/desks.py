"""A site's desk with a fake worker, and the server that asks it, for tests."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

import fedllm
from fedllm.app.catalog import CATALOG
from fedllm.app.config import Recipe
from fedllm.federation.site.audit import verify
from fedllm.federation.site.desk import Desk
from fedllm.federation.site.policy import Site
from fedllm.runtime.errand import request_id
from fedllm.runtime.line import decode, encode
from tests.messages import unpack_reply

WORKER = [sys.executable, "-S", str(Path(__file__).with_name("fake_worker.py"))]

METRICS = ("train_loss", "tokens", "pid", "memory")

PAYLOAD = bytes(range(256)) * 40


def site_in(folder, models=None, name="a", **policy):
    return Site(name=name, state=str(folder / "state"), models=models or {}, policy={"metrics": METRICS, **policy})


def desk_in(folder, **policy):
    return Desk(site_in(folder, **policy), WORKER, CATALOG)


def recipe(**changes):
    return {**Recipe().model_dump(mode="json"), "rounds": 100, **changes}


def key_of(data):
    return hashlib.sha256(data).hexdigest()


def say(desk, do, body=b"", **head):
    answer, data = decode(desk.answer(encode({"do": do, **head}, body)))
    return (answer, data) if do == "get" else answer


def ask(desk, run="r1", **changes):
    said = {"recipe": recipe(), "algorithm": ["fedavg"], "fedllm": fedllm.__version__, "model_sha256": "0" * 64}
    return say(desk, "ask", run=run, **{**said, "user": "admin@example.org", **changes})


def send(desk, data=PAYLOAD, run="r1"):
    return say(desk, "put", data, run=run, key=key_of(data), offset=0, size=len(data))


def request(number=0, op="train", client="a", **scalars):
    return {"client": client, "round": number, "op": op, "scalars": scalars}


def begin(desk, number=0, op="train", data=PAYLOAD, run="r1", **scalars):
    """Send the tensors and begin; the answer and the request's name."""
    send(desk, data, run)
    head = request(number, op, **scalars)
    return say(desk, "begin", run=run, key=key_of(data), request=head), request_id(key_of(data), head)


def finish(desk, number=0, op="train", data=PAYLOAD, run="r1", **scalars):
    """Begin and wait for the end."""
    answer, name = begin(desk, number, op, data, run, **scalars)
    while answer.get("state") == "running":
        answer = say(desk, "wait", run=run, id=name, seconds=10)
    return answer


def fetch(desk, done, run="r1"):
    answer, data = say(desk, "get", run=run, key=done["key"], offset=0, length=1 << 20)
    assert answer == {"size": done["size"]} and key_of(data) == done["key"]
    return bytes(data)


def at_work(desk, run="r1"):
    """Wait until the worker has taken its first step."""
    end = time.monotonic() + 10
    while not (work := say(desk, "ping")["work"]) or work[run]["step"] == 0:
        assert time.monotonic() < end


def log_of(folder, *what):
    entries = verify(folder / "state" / "audit.jsonl").entries
    return [entry for entry in entries if not what or entry["what"] in what]


def scalars(desk, done, run="r1"):
    return unpack_reply(fetch(desk, done, run)).scalars
