"""The site's desk: what a server may ask of a site, and the site's answers.

Nothing that a peer sends is trusted, and nothing of it raises. What takes long is begun and waited for.
Before a deed comes the policy, then its line in the audit log, then the deed.
"""

from __future__ import annotations

import json
import logging
import secrets
import threading
from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

import fedllm
from fedllm.core.errors import FedllmError, Refused, nearest
from fedllm.federation.site import record
from fedllm.federation.site.audit import Audit
from fedllm.federation.site.bench import Bench, Job
from fedllm.federation.site.disk import write
from fedllm.federation.site.doing import do, progress
from fedllm.federation.site.guard import Guard
from fedllm.federation.site.limits import once, today
from fedllm.federation.site.messages import matching, request_of, whole
from fedllm.federation.site.policy import NAME, SHA256, Known, Site
from fedllm.federation.site.rules import (
    NOBODY,
    SAID,
    Denied,
    Spending,
    by_epsilon,
    canonical,
    check,
    facts,
    governing,
    refusals,
)
from fedllm.federation.site.spool import Spool
from fedllm.runtime.errand import request_id
from fedllm.runtime.line import Body, Head, decode, encode

LARGEST_CHUNK = 16 << 20
LONGEST_WAIT = 10.0
MOST_REASONS = 20

log = logging.getLogger("fedllm.site")


class Desk:
    """A site at work; threads may share it. Closing it ends the worker and lets another desk have the site's state."""

    def __init__(
        self,
        site: Site,
        worker: Sequence[str],
        known: Known,
        weights: Callable[[str], str] | None = None,
        env: Mapping[str, str] | None = None,
        spending: Spending | None = None,
    ) -> None:
        """Open a site's state.

        Args:
            site: the site's file.
            worker: the command of the worker that holds model and data.
            known: the names that recipes can have, by kind.
            weights: hash of this site's weights of a base model, by path or name.
            env: added to the worker's environment.
            spending: the accountant of this site; without it a site with a limit on epsilon refuses every recipe.

        Raises:
            FedllmError: if another desk has the state, or the audit log was changed.
        """
        self._site, self._known, self._weights, self._spending = site, known, weights, spending
        self._state = Path(site.state)
        self._state.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._alone = FileLock(self._state / "lock", timeout=0, thread_local=False)
        try:
            self._alone.acquire()
        except Timeout:
            raise FedllmError(f"Another site daemon works in '{self._state}'; stop that one first.") from None
        self._boot = secrets.token_hex(8)
        try:
            self._audit = Audit(self._state / "audit.jsonl")
        except FedllmError:
            self._alone.release()
            raise
        self._spool = Spool(self._state / "spool")
        for half in self._state.glob("runs/*/.*"):
            half.unlink(missing_ok=True)
        self._entry = threading.Lock()
        self._leaving = set[tuple[str, str]]()
        self._guard = Guard(worker, self._state / "worker.log", env)
        self._bench = Bench(self._guard.start, self._do, self._guard.close)
        self._audit.append("start", fedllm=fedllm.__version__, site=site.name)
        self._does: dict[str, Callable[[Head, Body], tuple[Head, bytes]]] = {
            "ping": self._ping,
            "ask": self._ask,
            "put": self._put,
            "begin": self._begin,
            "wait": self._wait,
            "get": self._get,
            "stop": self._stop,
        }

    def __enter__(self) -> Desk:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """Stop what is at work and let go of the state."""
        self._bench.close()
        self._audit.append("end")
        self._audit.close()
        self._alone.release()

    def answer(self, data: bytes | bytearray) -> bytes:
        """Answer one message of a peer: an error is an answer too."""
        try:
            return encode(*self._answer(data))
        except (Refused, FedllmError) as problem:
            return encode({"error": str(problem), "rule": ""})
        except Exception as problem:
            log.exception("the desk failed")
            error = f"the site could not do this ({type(problem).__name__}); its log says where"
            return encode({"error": error, "rule": ""})

    def _answer(self, data: bytes | bytearray) -> tuple[Head, bytes]:
        head, body = decode(data)
        do = head.get("do")
        if not isinstance(do, str) or do not in self._does:
            raise Refused(f"{do!r:.50} is nothing that a site does; {nearest(str(do)[:50], self._does)}")
        try:
            return self._does[do](head, body)
        except Denied as denied:
            rule, sentence = denied.refusal
            self._audit.append("refuse", run=str(head.get("run"))[:64], rule=rule, asked=do, why=sentence)
            return {"error": sentence, "rule": rule}, b""

    def _ping(self, head: Head, body: Body) -> tuple[Head, bytes]:
        work = {job.run: progress(job, self._site.policy) for job in reversed(self._bench.running())}
        return {"fedllm": fedllm.__version__, "boot": self._boot, "work": work}, b""

    def _ask(self, head: Head, body: Body) -> tuple[Head, bytes]:
        run = matching(NAME, head, "run")
        said = {key: head.get(key) for key in SAID}
        asked = facts(said)
        found = list(islice(refusals(self._site, asked, self._known, self._weights), MOST_REASONS))
        if not found:
            found = list(by_epsilon(self._site, dict(said["recipe"] or {}), run, self._spending or NOBODY))
        about = {"run": run, "recipe": asked.recipe, "user": asked.user}
        if found:
            for rule, sentence in found:
                self._audit.append("refuse", **about, rule=rule, asked="ask", why=sentence)
            reasons = [sentence for _, sentence in found]
            return {"allowed": False, "rule": found[0].rule, "error": reasons[0], "reasons": reasons}, b""
        # The worker goes by this file; one that differs means another model or other parts.
        recipe = canonical({"recipe": said["recipe"], "model_sha256": asked.model_sha256})
        with self._entry:
            folder = self._folder(run)
            if (folder / "recipe.json").exists() and (folder / "recipe.json").read_bytes() != recipe:
                raise Denied("ask", f"The run '{run}' was begun at {self._site.name} with another recipe; rename it.")
            self._audit.append("ask", **about, model=asked.model_sha256, rule=self._rules())
            folder.mkdir(parents=True, exist_ok=True)
            write(folder / "recipe.json", recipe)
            write(folder / "asked.json", canonical(said))
        self._bench.get_ready()
        return {"allowed": True, "reasons": []}, b""

    def _put(self, head: Head, body: Body) -> tuple[Head, bytes]:
        run, key = matching(NAME, head, "run"), matching(SHA256, head, "key")
        offset, size = whole(head, "offset"), whole(head, "size")
        self._allowed(run)
        most = self._site.policy.max_message_mb
        if size > most * 1e6:
            raise Denied(
                "max_message_mb",
                f"{self._site.name} takes messages of {most:g} MB at most; this one has {size / 1e6:.1f} MB.",
            )
        if size == 0 or len(body) > LARGEST_CHUNK:
            raise Refused(f"a message comes in chunks of at most {LARGEST_CHUNK} bytes, and has at least one byte")
        return {"have": self._spool.put(key, offset, size, body)}, b""

    def _begin(self, head: Head, body: Body) -> tuple[Head, bytes]:
        run, key = matching(NAME, head, "run"), matching(SHA256, head, "key")
        with self._entry:
            folder, said = self._allowed(run)
            request = request_of(head.get("request"), self._site.name)
            name = request_id(key, head["request"])
            # In this order: work leaves the bench when it is recorded.
            if (job := self._bench.find(run, name)) and job.state == "running":
                return {"state": "running"}, b""
            if (done := record.find(folder, name)) and done.kept:
                return told(done), b""
            once(folder, name, request, said["recipe"]["rounds"], self._bench.running(run))
            today(self._site, self._audit.recent(), run, request)
            path = self._spool.hold(key)
            if path is None:
                return {"state": "missing"}, b""
            try:
                if request.op == record.TRAIN and self._spending:
                    self._spending.note(said["recipe"], run, request.round)
                about = {"run": run, "round": request.round, "op": request.op, "request": name, "user": said["user"]}
                self._audit.append("begin", **about, bytes=path.stat().st_size, rule=self._rules())
                self._bench.add(Job(run, name, key, request, path))
            except BaseException:
                self._spool.let_go(key)
                raise
        return {"state": "running"}, b""

    def _wait(self, head: Head, body: Body) -> tuple[Head, bytes]:
        run, name = matching(NAME, head, "run"), matching(SHA256, head, "id")
        seconds = head.get("seconds")
        if not isinstance(seconds, (int, float)) or seconds != seconds:
            raise Refused("'seconds' is not a number")
        if job := self._bench.find(run, name):
            self._bench.wait(job, min(max(0.0, seconds), LONGEST_WAIT))
            if job.state == "running":
                # What waits behind other work of its run goes on as that does.
                at_work = next(iter(self._bench.running(run)), job)
                return {"state": "running", "progress": progress(at_work, self._site.policy)}, b""
            if job.state == "failed":
                return {"state": "failed", "error": job.error}, b""
        done = record.find(self._folder(run), name)
        return (told(done) if done and done.kept else {"state": "unknown"}), b""

    def _get(self, head: Head, body: Body) -> tuple[Head, bytes]:
        run, key = matching(NAME, head, "run"), matching(SHA256, head, "key")
        offset, length = whole(head, "offset"), whole(head, "length")
        folder, _ = self._allowed(run)
        done = record.with_reply(folder, key)
        if done is None:
            raise Refused(f"no reply with the key {key[:12]} is kept here for the run '{run}'")
        if offset == 0 or (run, key) not in self._leaving:
            about = {"run": run, "round": done.round, "op": done.op, "request": done.request}
            self._audit.append("get", **about, bytes=done.size, rule=self._rules())
            self._leaving.add((run, key))
        with done.path.open("rb") as file:
            file.seek(offset)
            return {"size": done.size}, file.read(min(length, LARGEST_CHUNK))

    def _stop(self, head: Head, body: Body) -> tuple[Head, bytes]:
        run = matching(NAME, head, "run")
        stopped = self._bench.stop(run)
        if stopped:
            self._audit.append("stop", run=run)
        return {"stopped": stopped}, b""

    def _do(self, job: Job) -> None:
        """Do a job, in the bench's thread."""
        try:
            do(job, self._folder(job.run), self._site, self._guard, self._audit)
        finally:
            # The next work of the run may have the same tensors; the file stays until its room is needed.
            self._spool.let_go(job.payload)

    def _allowed(self, run: str) -> tuple[Path, dict[str, Any]]:
        """Return the folder of a run that was asked for and what was said then, if the policy of today allows it."""
        path = self._folder(run) / "asked.json"
        if not path.exists():
            raise Denied("ask", f"The run '{run}' was not asked for at {self._site.name}; ask first.")
        said: dict[str, Any] = json.loads(path.read_bytes())
        if refusal := check(self._site, facts(said), self._known):
            raise Denied(*refusal)
        return path.parent, said

    def _folder(self, run: str) -> Path:
        return self._state / "runs" / run

    def _rules(self) -> str:
        return ", ".join(governing(self._site))


def told(done: record.Done) -> Head:
    """Return what is told of recorded work."""
    return {"state": "done", "key": done.reply, "size": done.size}
