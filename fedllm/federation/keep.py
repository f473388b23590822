"""Keeps one of FLARE's processes alive: started anew when it dies, dead when this process is."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from fedllm.core.errors import FedllmError
from fedllm.federation import leash

LOOK = 0.2
SHORTEST, LONGEST = 1.0, 30.0
"""Seconds before a process that died is started anew: twice as many each time that it lived for less than a minute."""

LARGEST_LOG = 20_000_000

SETTINGS = {
    # As FLARE's own start script has it: fewer arenas, less memory that nobody uses.
    "MALLOC_ARENA_MAX": "2",
    # A job that is over waits this long for a dead site's last word, not a quarter of an hour.
    "NVFLARE_CLIENT_OUTCOME_WAIT_TIMEOUT": "15",
    # For every answer received FLARE keeps a thread for as long as its sender might send it again.
    "NVFLARE_STREAMING_RETRY_WAIT": "8",
    "NVFLARE_STREAMING_RETRY_TIMEOUT": "12",
    # Bytes in flight per message: less memory, and as fast with many at once.
    "NVFLARE_STREAMING_WINDOW_SIZE": str(16 << 20),
    "NVFLARE_STREAMING_ACK_INTERVAL": str(4 << 20),
    "PYTHONUNBUFFERED": "1",
}


def keep(
    command: Sequence[str], env: Mapping[str, str], log: Path, stop: threading.Event, beat: Callable[[], None]
) -> None:
    """Run a Python module until `stop`; call it from the main thread, with which the process dies.

    Args:
        command: the module and its arguments.
        env: added to this process's environment.
        log: where its output goes; what is there from before is kept up to a size.
        stop: ends it.
        beat: called a few times a second while all is well.
    """
    wait = SHORTEST
    while not stop.is_set():
        begun = time.monotonic()
        if log.exists() and log.stat().st_size > LARGEST_LOG:
            log.replace(log.with_name(f"{log.name}.1"))
        with log.open("ab") as out:
            child = subprocess.Popen(
                [sys.executable, "-P", str(leash.__file__), str(os.getpid()), sys.executable, "-m", *command],
                env={**os.environ, **SETTINGS, **env},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
        try:
            while child.poll() is None and not stop.wait(LOOK):
                beat()
        finally:
            end(child)
        lived = time.monotonic() - begun
        wait = SHORTEST if lived > 60 else min(LONGEST, 2 * wait)
        until = time.monotonic() + wait
        while time.monotonic() < until and not stop.wait(LOOK):
            beat()


def end(child: subprocess.Popen[bytes]) -> None:
    """Kill a process; FLARE's own shutdown takes seconds and saves nothing that a kill would lose."""
    with suppress(ProcessLookupError):
        os.killpg(child.pid, signal.SIGKILL)
    child.wait()


def needs_flare() -> None:
    """Say what to install when the engine is not there."""
    if find_spec("nvflare") is None:
        raise FedllmError("NVIDIA FLARE is not installed; `pip install 'fedllm[federation]'` brings it.")


@contextmanager
def sockets() -> Iterator[str]:
    """Yield a folder for Unix sockets, which only this user can reach."""
    # A socket's path has 107 characters at most, and a federation's folder may have more.
    folder = tempfile.mkdtemp(prefix="fedllm-", dir=os.environ.get("XDG_RUNTIME_DIR"))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def until_told() -> Iterator[threading.Event]:
    """Yield an event that SIGTERM and SIGINT set."""
    stop = threading.Event()

    def told(number: int, frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, told) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
