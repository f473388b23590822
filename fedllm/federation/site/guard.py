"""The guard of a site's worker: a resident child process whose death is one failed reply and never more."""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from threading import Event
from typing import Any

from fedllm.federation import leash

TICK = 0.05
"""Seconds after which a stop, or a death that closed nothing, is noticed at the latest."""

GARBAGE = "the site's worker wrote what is not an answer to its output; its log may say why"

LONGEST_LINE = 1_000_000
LONGEST_REASON = 500

Progress = Callable[[Mapping[str, Any]], None]


class Failed(Exception):
    """The worker did not do what it was asked; one sentence says why. The next request finds a worker again."""


class Guard:
    """A worker that is started when it is needed and kept from one request to the next.

    It is told one JSON line a request and answers with lines: `progress`, then `done` or `failed`. One
    thread uses the guard: on Linux the worker dies with the thread that started it.
    """

    def __init__(self, command: Sequence[str], log: Path, env: Mapping[str, str] | None = None) -> None:
        """Say what to start: what it writes to stderr goes to `log`, `env` is added to its environment."""
        self._command, self._log, self._env = list(command), log, dict(env or {})
        self._child: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start the worker unless it is there and waits.

        Raises:
            Failed: if there is no such command.
        """
        if self._child is not None and (self._child.poll() is not None or self._speaks(0)):
            self._end()
        if self._child is None:
            leashed = [sys.executable, "-P", str(leash.__file__), str(os.getpid()), *self._command]
            try:
                with self._log.open("ab") as log:
                    self._child = subprocess.Popen(
                        leashed,
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        bufsize=0,
                        env={**os.environ, **self._env},
                        # A Ctrl-C in a terminal is for the daemon, which then ends the worker.
                        start_new_session=True,
                    )
            except OSError as error:
                raise Failed(f"the site's worker cannot be started ({error.strerror})") from error

    def work(self, request: Mapping[str, Any], progress: Progress, stop: Event) -> None:
        """Let the worker do a request, and return when it says that it is done.

        Raises:
            Failed: if it says that it failed, dies, speaks what is not its language, or is stopped.
        """
        self.start()
        assert self._child is not None and self._child.stdin is not None and self._child.stdout is not None
        with suppress(BrokenPipeError):  # What the worker died of is read from its output.
            self._child.stdin.write(json.dumps(request).encode() + b"\n")
        try:
            reason = self._reason(progress, stop)
        except Exception:
            # What it says from now on would be taken for the answer to the next request.
            self.close()
            raise
        if reason is not None:
            raise Failed(reason[:LONGEST_REASON])

    def _reason(self, progress: Progress, stop: Event) -> str | None:
        """Hear the worker out, until it says that it is done, or the reason why it failed."""
        assert self._child is not None and self._child.stdout is not None
        heard = b""
        while not stop.is_set():
            if not self._speaks(TICK):
                if self._child.poll() is None:
                    continue
                raise Failed(self._epitaph())
            data = os.read(self._child.stdout.fileno(), 1 << 16)
            if not data:
                raise Failed(self._epitaph())
            *lines, heard = (heard + data).split(b"\n")
            for line in lines:
                match answer_in(line):
                    case {"progress": dict(how)}:
                        progress(how)
                    case {"done": True}:
                        return None
                    case {"failed": str(reason)}:
                        return reason
                    case _:
                        raise Failed(GARBAGE)
            if len(heard) > LONGEST_LINE:
                raise Failed(GARBAGE)
        raise Failed("it was stopped")

    def close(self) -> None:
        """End the worker."""
        if self._child is not None:
            self._end()

    def _speaks(self, seconds: float) -> bool:
        """Wait for output of the worker, or for the end of it."""
        assert self._child is not None and self._child.stdout is not None
        with selectors.DefaultSelector() as selector:
            selector.register(self._child.stdout, selectors.EVENT_READ)
            return bool(selector.select(seconds))

    def _epitaph(self) -> str:
        """Clear the dead worker away and say what it died of."""
        code = self._end(patience=0.5)
        return f"the site's worker died (signal {-code})" if code < 0 else f"the site's worker ended (exit code {code})"

    def _end(self, patience: float = 0.0) -> int:
        """End the worker and what it may have started; return its exit status."""
        child, self._child = self._child, None
        assert child is not None and child.stdin is not None and child.stdout is not None
        # Its output closes a little before its status is there.
        with suppress(subprocess.TimeoutExpired):
            child.wait(patience)
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
        child.stdin.close()
        child.stdout.close()
        return child.wait()


def answer_in(line: bytes) -> Any:
    """Return what a line says, or None if it is not JSON."""
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None
