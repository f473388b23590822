"""The site's bench: pieces of work one after another in a thread of their own, watched and stopped from others."""

from __future__ import annotations

import logging
import threading
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Request
from fedllm.federation.site.guard import Failed

QUEUED = 8
"""Pieces of work that may wait."""

REMEMBERED = 64
"""Failed pieces of work of which the reason is still told."""

NUMBERS = ("step", "steps", "tokens", "read", "seconds", "loss")
"""What a worker says of its work; tokens that are only `read` stay at the site."""
LARGEST = 2.0**53

log = logging.getLogger("fedllm.site")


@dataclass
class Job:
    """A piece of work: a request of a run."""

    run: str
    name: str
    """What tells the request from all others, as both sides compute it."""
    payload: str
    """Key of its tensors' file."""
    request: Request
    """Without its tensors."""
    path: Path
    """Its tensors' file."""
    state: str = "running"
    error: str = ""
    progress: dict[str, Any] = field(default_factory=dict)
    stop: threading.Event = field(default_factory=threading.Event)

    def hear(self, said: Mapping[str, Any]) -> None:
        """Take note of how far the work is: numbers only."""
        numbers = {key: said.get(key) for key in NUMBERS}
        self.progress = {
            key: value for key, value in numbers.items() if isinstance(value, (int, float)) and abs(value) < LARGEST
        }


class Bench:
    """Does jobs in order; threads may share it. `do` raises `Failed` or `FedllmError` for a job that failed."""

    def __init__(self, warm: Callable[[], None], do: Callable[[Job], None], clean: Callable[[], None]) -> None:
        """Say what gets ready for work, what does a job and what cleans up at the end; one thread calls all three."""
        self._warm, self._do, self._clean = warm, do, clean
        self._changed = threading.Condition()
        self._queue, self._jobs = deque[Job | None](), dict[tuple[str, str], Job]()
        self._current: Job | None = None
        self._closed = False
        self._thread = threading.Thread(target=self._work, name="bench", daemon=True)
        self._thread.start()

    def get_ready(self) -> None:
        """Get ready for work that is to come, unless there is some already."""
        with self._changed:
            if not self._queue and self._current is None:
                self._queue.append(None)
                self._changed.notify_all()

    def add(self, job: Job) -> None:
        """Put a job at the end.

        Raises:
            Refused: if too many wait already.
        """
        with self._changed:
            if sum(each is not None for each in self._queue) >= QUEUED:
                raise Refused(f"{QUEUED} pieces of work wait here already; ask again when some are done")
            failed = [each for each, other in self._jobs.items() if other.state == "failed"]
            for each in failed[: max(0, len(failed) - REMEMBERED)]:
                del self._jobs[each]
            self._jobs.pop((job.run, job.name), None)
            self._jobs[job.run, job.name] = job
            self._queue.append(job)
            self._changed.notify_all()

    def find(self, run: str, name: str) -> Job | None:
        """Return a job that runs, waits or failed."""
        with self._changed:
            return self._jobs.get((run, name))

    def running(self, run: str | None = None) -> list[Job]:
        """Return the jobs that run or wait, of one run or of all; the one at work first."""
        with self._changed:
            jobs = [job for job in self._jobs.values() if job.state == "running" and run in (None, job.run)]
            return sorted(jobs, key=lambda job: job is not self._current)

    def wait(self, job: Job, seconds: float) -> None:
        """Return when the job has ended, or after so many seconds."""
        with self._changed:
            self._changed.wait_for(lambda: job.state != "running", seconds)

    def stop(self, run: str | None = None, seconds: float = 5.0) -> bool:
        """Stop the jobs of one run, or all, and say whether there were any; waits until the work has ended."""
        with self._changed:
            jobs = self.running(run)
            for job in jobs:
                job.stop.set()
                if job in self._queue:
                    self._queue.remove(job)
                    self._settle(job, "it was stopped")
            self._changed.wait_for(lambda: all(job.state != "running" for job in jobs), seconds)
            return bool(jobs)

    def close(self) -> None:
        """Stop all work and clean up."""
        self.stop()
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._thread.join()

    def _work(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if self._closed:
                    break
                job = self._current = self._queue.popleft()
            error = self._tried(job)
            with self._changed:
                self._current = None
                if job is not None:
                    self._settle(job, error)
        self._clean()

    def _tried(self, job: Job | None) -> str:
        """Do a job, or get ready for one, and return why it failed, if it did."""
        try:
            if job is None:
                self._warm()
            else:
                self._do(job)
        except (Failed, FedllmError, Refused) as problem:
            what = f"{job.request.op} of round {job.request.round} of the run {job.run}" if job else "the worker"
            log.warning("%s: %s", what, problem)
            return str(problem)
        except Exception as problem:
            log.exception("the bench failed")
            return f"the site failed ({type(problem).__name__}); its log says where"
        return ""

    def _settle(self, job: Job, error: str) -> None:
        """Say that a job has ended; what is done is told by the record from now on."""
        job.state, job.error = ("failed", error) if error else ("done", "")
        if not error:
            self._jobs.pop((job.run, job.name), None)
        self._changed.notify_all()
