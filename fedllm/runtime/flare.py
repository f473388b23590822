"""NVIDIA FLARE as an engine: what runs in its job processes, and the job that starts them.

A job carries no code and names only the run. At the server it is `Lead`, which makes a `Line` of the
engine's proxies and calls the run's loop. At a site it is `Relay`, which passes bytes to the site's
desk over a Unix socket and never looks into them. Both learn from their own machine's environment
where things are, never from the job.
"""

from __future__ import annotations

import gc
import importlib
import io
import json
import logging
import os
import queue
import socket
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock
from nvflare.apis.event_type import EventType
from nvflare.apis.fl_component import FLComponent
from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.collab import CollabCallError, collab
from nvflare.collab.api.exceptions import RunAborted
from nvflare.fuel.utils.buffer_list import ConsumableBufferList

from fedllm.core.errors import FedllmError, Refused
from fedllm.runtime import pipe
from fedllm.runtime.line import Aborted, Body, Head, Line, Unreachable, decode, encode

FOLDER, LOOP, DESK = "FEDLLM_FOLDER", "FEDLLM_LOOP", "FEDLLM_DESK"
"""The environment: the federation's folder and the run's loop at the server, the desk's socket at a site."""

STOP_SECONDS = 5.0

BUSY, QUIET = 0.5, 10.0
"""Seconds after which a site asks FLARE for a task again: while two of them set a job up, and when no more will come.
To ask costs 2 kB each way, which is more than small updates take over an hour's training."""

LARGEST_ANSWER = 32 << 20
"""Bytes of an answer of the desk; a piece of a reply is far smaller."""

SWEPT = 32 << 20
"""Bytes of messages after which a process frees what is left of them."""


log = logging.getLogger("fedllm.flare")


class Lead(FLComponent):
    """The server's side of a run: calls `loop(folder, line, expected)` and writes down how it ended."""

    def __init__(self, run: str, attempt: str) -> None:
        super().__init__()
        only_bytes()
        self.run, self.attempt = run, attempt
        self.runner: Any = None

    def handle_event(self, event_type: str, fl_ctx: FLContext) -> None:
        """Keep FLARE's runner of this job, which it names to its components only."""
        if event_type == EventType.START_RUN:
            self.runner = fl_ctx.get_prop(FLContextKey.RUNNER)

    @collab.main
    def main(self) -> None:
        """Run the loop; FLARE calls this once per job."""
        self.runner.config.task_request_interval = QUIET
        folder = Path(os.environ[FOLDER]) / "runs" / self.run
        context = collab.context
        write_down(folder / "server.log")
        # An attempt that dies slowly must not work beside the next one.
        with FileLock(folder / "attempt.lock", timeout=30):
            wish = Wish(folder)
            proxies = {proxy.name: proxy for proxy in context.clients}
            line = line_over(proxies, context.is_aborted, wish.stopped.is_set)
            # What the sites are told goes over a line of its own, since the loop's ends with the wish.
            telling = line_over(proxies, context.is_aborted, lambda: False)
            watcher = threading.Thread(target=wish.watch, args=(self.run, telling), daemon=True)
            watcher.start()
            end = ended(os.environ[LOOP], folder, line, wish)
            wish.over.set()
            watcher.join(2 * STOP_SECONDS)
            tell(folder / "ended.json", {"attempt": self.attempt, **end}, context.is_aborted)


class Relay:
    """A site's side: bytes from the server to the desk and back."""

    def __init__(self) -> None:
        only_bytes()
        self.path = os.environ.get(DESK, "")
        self.free: queue.LifoQueue[socket.socket] = queue.LifoQueue()

    @collab.publish
    def answer(self, data: bytes) -> bytes:
        """Return the desk's answer, or an error that says that there is no desk."""
        # Collab lets any party of a job call any other; a site is nobody's server.
        if collab.caller != "server" or not isinstance(data, bytes | bytearray):
            return encode({"error": "Only the server may ask a site.", "rule": "caller"})
        try:
            answer = self.ask(bytes(data))
            sweep(len(data) + len(answer))
            return answer
        except (OSError, EOFError) as error:
            # It may be starting anew, so whoever asks should ask again.
            return encode({"unreachable": f"the site's daemon does not answer ({type(error).__name__})"})

    def ask(self, data: bytes) -> bytes:
        """Ask over a connection that is free, or over a new one."""
        with suppress(queue.Empty, OSError, EOFError):
            return self.over(self.free.get_nowait(), data)
        # The daemon may have been started anew since; what it answers is the same whoever asks twice.
        desk = socket.socket(socket.AF_UNIX)
        desk.connect(self.path)
        return self.over(desk, data)

    def over(self, desk: socket.socket, data: bytes) -> bytes:
        """Ask over this connection, and keep it if it still works."""
        try:
            pipe.tell(desk, data)
            answer = bytes(pipe.hear(desk, LARGEST_ANSWER))
        except BaseException:
            desk.close()
            raise
        self.free.put(desk)
        return answer


def write_down(path: Path) -> None:
    """Have this process write its log into a file too: ours, and the warnings of others."""
    handler = logging.FileHandler(path, delay=True)
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(name)s: %(message)s"))
    handler.addFilter(lambda line: line.levelno >= logging.WARNING or line.name.startswith("fedllm"))
    logging.getLogger().addHandler(handler)


def only_bytes() -> None:
    """Spare a process that passes bytes what FLARE does with tensors and with its log.

    The decoder of tensors would load torch. And for every request FLARE 2.9 formats the whole payload
    for a debug line that nobody reads, which takes more time than to receive it.
    """
    sys.modules.setdefault("nvflare.app_opt.pt.decomposers", None)  # type: ignore[arg-type]
    ConsumableBufferList.__repr__ = lambda self: f"{len(self)} buffers"


class Sweep:
    """Frees what FLARE keeps of large messages: cycles of a few objects, too few for the collector to wake up.

    What is there before the first large message is set apart, so that looking for the rest takes milliseconds.
    """

    def __init__(self) -> None:
        self.passed, self.frozen, self.lock = 0, False, threading.Lock()

    def __call__(self, size: int) -> None:
        """Note a message of so many bytes."""
        with self.lock:
            self.passed += size
            if self.passed < SWEPT:
                return
            self.passed = 0
        gc.collect()
        if not self.frozen:
            self.frozen = True
            gc.freeze()


sweep = Sweep()


class Wish:
    """What the user wants of a run that is at work: `run.json` says so and may change at any time."""

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.json"
        self.stopped, self.over = threading.Event(), threading.Event()

    def sites(self) -> Sequence[str]:
        """Return the sites that are expected to take part."""
        return [str(name) for name in json.loads(self.path.read_text(encoding="utf-8")).get("sites", [])]

    def watch(self, run: str, line: Line) -> None:
        """Wait until the run is to be stopped; then stop the loop, and really stop the work at the sites.

        In this order: work that was stopped must not count as a site's failure in a round that goes on.
        """
        while not self.over.wait(0.5):
            with suppress(OSError, ValueError):
                if json.loads(self.path.read_text(encoding="utf-8"))["wanted"] == "stop":
                    break
        else:
            return
        self.stopped.set()
        asks = [threading.Thread(target=stop_at, args=(line, site, run), daemon=True) for site in line.sites()]
        for ask in asks:
            ask.start()
        until = time.monotonic() + STOP_SECONDS
        for ask in asks:
            ask.join(max(0.0, until - time.monotonic()))


def stop_at(line: Line, site: str, run: str) -> None:
    """Tell one site to stop; one that cannot be reached has nothing to be told."""
    with suppress(Unreachable, Aborted):
        line.call(site, {"do": "stop", "run": run}, b"", STOP_SECONDS)


def line_over(proxies: Mapping[str, Any], aborted: Callable[[], bool], stopped: Callable[[], bool]) -> Line:
    """Return a `Line` over Collab's proxies, one by site."""

    def check() -> None:
        if stopped():
            raise Aborted("The run was stopped.")
        if aborted():
            raise Aborted("The engine ended this attempt; the next one goes on from the last round.")

    def call(site: str, head: Head, body: bytes, seconds: float) -> tuple[Head, Body]:
        check()
        if site not in proxies:
            raise Unreachable(f"{site} is not connected")
        try:
            answer = proxies[site](timeout=seconds).answer(encode(head, body))
        except (RunAborted, CollabCallError, RuntimeError) as error:
            # An abort first looks like a timeout, so the signal is asked whatever was raised.
            if isinstance(error, RunAborted):
                raise Aborted("The engine ended this attempt; the next one goes on from the last round.") from error
            check()
            raise Unreachable(f"{site} does not answer ({error})") from error
        check()
        sweep(len(body) + len(answer) if isinstance(answer, bytes | bytearray) else 0)
        if not isinstance(answer, bytes | bytearray):
            raise Unreachable(f"{site} answers with something that is not bytes")
        try:
            told, content = decode(answer)
        except Refused as error:
            raise Unreachable(f"{site} answers with something that is not a message ({error})") from error
        if "unreachable" in told:
            raise Unreachable(f"{site} does not answer ({str(told['unreachable'])[:200]})")
        return told, content

    return Line(call, lambda: list(proxies), check)


def ended(loop: str, folder: Path, line: Line, wish: Wish) -> dict[str, str]:
    """Run the loop and say how it ended: done, stopped, failed (the user must mend it), aborted or crashed."""
    try:
        load(loop)(folder, line, wish.sites())
        return {"state": "done", "reason": ""}
    except Aborted as error:
        return {"state": "stopped" if wish.stopped.is_set() else "aborted", "reason": str(error)}
    except FedllmError as error:
        return {"state": "failed", "reason": str(error)}
    except Exception as error:  # a crash is written down for the supervisor, which tries again
        log.exception("the loop of a run crashed")
        return {"state": "crashed", "reason": f"{type(error).__name__}: {error}"}


def tell(path: Path, end: Mapping[str, str], aborted: Callable[[], bool]) -> None:
    """Write down how an attempt ended; where the disk is full, as soon as there is room."""
    from fedllm.runtime.store import write_text

    while not aborted():
        try:
            return write_text(path, json.dumps(end))
        except FedllmError as error:
            log.warning("%s", error)
            time.sleep(2.0)


def load(name: str) -> Callable[..., None]:
    """Return the function that `module:function` names."""
    module, _, function = name.partition(":")
    loop: Callable[..., None] = getattr(importlib.import_module(module), function)
    return loop


def job(run: str, attempt: str, sites: Sequence[str]) -> tuple[dict[str, Any], bytes]:
    """Return a job's meta and its zipped folder: configuration only, one app for the server and one for the sites."""
    meta: dict[str, Any] = {
        "name": run,
        "job_folder_name": "job",
        "resource_spec": {},
        "min_clients": 1,
        "deploy_map": {"lead": ["server"], "relay": list(sites)},
    }
    collab_parts = "nvflare.collab.runtime"
    lead = {
        "format_version": 2,
        "server": {"task_request_interval": BUSY},
        "workflows": [
            {
                "id": "controller",
                "path": f"{collab_parts}.controller.CollabController",
                "args": {"server_obj_id": "fedllm_lead", "sync_task_timeout": 60},
            }
        ],
        "components": [
            {"id": "fedllm_lead", "path": "fedllm.runtime.flare.Lead", "args": {"run": run, "attempt": attempt}}
        ],
    }
    executor = {"path": f"{collab_parts}.executor.CollabExecutor", "args": {"client_obj_id": "fedllm_relay"}}
    relay = {
        "format_version": 2,
        "executors": [{"tasks": ["*"], "executor": executor}],
        "components": [{"id": "fedllm_relay", "path": "fedllm.runtime.flare.Relay", "args": {}}],
    }
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w") as folder:
        folder.writestr("job/meta.json", json.dumps(meta))
        folder.writestr("job/lead/config/config_fed_server.json", json.dumps(lead))
        folder.writestr("job/relay/config/config_fed_client.json", json.dumps(relay))
    return meta, packed.getvalue()
