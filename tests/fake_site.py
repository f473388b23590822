"""A site in memory that keeps the rules of a site's desk, the faults of a line to it, and clients for both."""

from __future__ import annotations

import threading
import time
from collections import Counter
from queue import SimpleQueue

import torch

from fedllm.core.types import Reply, Request, Silo
from fedllm.runtime.errand import request_id
from fedllm.runtime.line import Aborted, Line, Unreachable, decode, encode
from fedllm.runtime.spool import load_message, save_message, sha256_of
from fedllm.runtime.wire import reply_head

RUN = "run-1"


def silo(name, memory=None):
    return Silo(name, None, {}, memory or {}, 0)


def stepping(request, own):
    """A client whose reply shows its name, its memory and every bit of what it was sent."""
    count = own.memory.get("count", torch.zeros(()))
    tensors = {}
    for name, value in request.tensors.items():
        if value.dtype == torch.bool:
            tensors[name] = ~value
        elif value.is_floating_point():
            tensors[name] = value * 1.3 + len(own.name) + count.to(value.dtype)
        else:
            tensors[name] = value + 1
    scalars = {"loss": float(count) + request.scalars.get("lr", 0.0)}
    return Reply(own.name, request.round, tensors, 1.0 + len(own.name), scalars), {"count": count + 1}


def same(left, right):
    """Whether two replies are the same to the last bit; the order of their tensors is part of them."""
    return left._replace(tensors={}) == right._replace(tensors={}) and all(
        one == other
        and left.tensors[one].dtype == right.tensors[one].dtype
        and torch.equal(left.tensors[one], right.tensors[one])
        for one, other in zip(left.tensors, right.tensors, strict=True)
    )


class FakeSite:
    """An honest desk: content-addressed files, recorded replies, one request worked on at a time."""

    def __init__(self, name, client, folder):
        self.name, self.client, self.folder = name, client, folder
        self.seen, self.files, self.done, self.ran = Counter(), {}, {}, []
        self.memory, self.lock, self.queue = {}, threading.RLock(), SimpleQueue()
        folder.mkdir(parents=True)
        threading.Thread(target=self.bench, daemon=True).start()

    def answer(self, data):
        head, body = decode(data)
        self.seen[head["do"]] += 1
        return encode(*getattr(self, f"do_{head['do']}")(head, body))

    def do_ping(self, head, body):
        return {"fedllm": "0", "boot": "0", "work": {}}, b""

    def do_put(self, head, body):
        path = self.folder / head["key"]
        with self.lock:
            have = path.stat().st_size if path.exists() else 0
            if body and head["offset"] == have:
                with path.open("ab") as file:
                    file.write(body)
                have += len(body)
                if have == head["size"] and sha256_of(path) != head["key"]:
                    path.unlink()
                    return {"error": "the file's sha256 is another", "rule": ""}, b""
            self.files[head["key"]] = head["size"]
        return {"have": have}, b""

    def do_begin(self, head, body):
        key, asked = head["key"], head["request"]
        path, name = self.folder / key, request_id(key, asked)
        if asked["client"] != self.name:
            return {"error": f"the request is for '{asked['client']}'", "rule": ""}, b""
        if not path.exists() or path.stat().st_size != self.files[key]:
            return {"state": "missing"}, b""
        with self.lock:
            if name not in self.done:
                self.done[name] = threading.Event(), {}
                self.queue.put((name, path, asked, *self.done[name]))
        return self.state(name), b""

    def do_wait(self, head, body):
        if head["id"] not in self.done:
            return {"state": "unknown"}, b""
        self.done[head["id"]][0].wait(head["seconds"])
        return self.state(head["id"]), b""

    def do_get(self, head, body):
        path = self.folder / head["key"]
        with path.open("rb") as file:
            file.seek(head["offset"])
            return {"size": path.stat().st_size}, file.read(head["length"])

    def state(self, name):
        event, said = self.done[name]
        return said if event.is_set() else {"state": "running", "progress": {"step": 1, "steps": 2, "tokens": 3}}

    def bench(self):
        while True:
            self.work(*self.queue.get())

    def work(self, name, path, asked, event, said):
        try:
            request = Request(**asked | {"tensors": load_message(path)[0]})
            self.ran.append(name)
            reply, self.memory = self.client(request, silo(self.name, self.memory))
            stored = save_message(self.folder / f"new-{name}", reply.tensors, reply_head(reply))
            stored.path.rename(self.folder / stored.key)
            said |= {"state": "done", "key": stored.key, "size": stored.size}
        except Exception as error:
            said |= {"state": "failed", "error": str(error)}
        event.set()

    def forget(self):
        """Restart: what is done stays known, what is under way does not."""
        self.done = {name: kept for name, kept in self.done.items() if kept[0].is_set()}


def line_to(sites, faults=None):
    """A line to sites by name; a fault stands in the way of one site's calls: `fault(pass_on, head, body, seconds)`."""

    def call(name, head, body, seconds):
        site = sites[name]

        def pass_on(head, body):
            return decode(site.answer(encode(head, body)))

        fault = (faults or {}).get(name)
        return fault(pass_on, head, body, seconds) if fault else pass_on(head, body)

    return Line(call, lambda: list(sites))


def at(numbers, do=None):
    """Say of every call, the `do` ones counted from 0, whether its number is among `numbers`."""
    count = iter(range(10**9))
    return lambda head: (do is None or head["do"] == do) and next(count) in numbers


def unreachable(when):
    """Calls that do not get through."""

    def fault(pass_on, head, body, seconds):
        if when(head):
            raise Unreachable("the link is cut")
        return pass_on(head, body)

    return fault


def unanswered(when):
    """Calls that get through and whose answers do not."""

    def fault(pass_on, head, body, seconds):
        answer = pass_on(head, body)
        if when(head):
            raise Unreachable("the answer is lost")
        return answer

    return fault


def twice(pass_on, head, body, seconds):
    """Every call is delivered two times."""
    pass_on(head, body)
    return pass_on(head, body)


def aborting(when):
    def fault(pass_on, head, body, seconds):
        if when(head):
            raise Aborted("the engine ended the run")
        return pass_on(head, body)

    return fault


def slow(pause, do=None):
    def fault(pass_on, head, body, seconds):
        if do in (None, head["do"]):
            time.sleep(pause)
        return pass_on(head, body)

    return fault


def lying(do, change):
    """Change what a site answers to `do`: `change(head, body) -> (head, body)`."""

    def fault(pass_on, head, body, seconds):
        answer = pass_on(head, body)
        return change(*answer) if head["do"] == do else answer

    return fault
