"""The server's daemon: FLARE's server process with fedllm's hub in it, kept alive."""

from __future__ import annotations

from pathlib import Path

from filelock import FileLock, Timeout

from fedllm.core.errors import FedllmError
from fedllm.federation import kits
from fedllm.federation.health import beat
from fedllm.federation.keep import keep, needs_flare, sockets, until_told
from fedllm.federation.members import of
from fedllm.federation.server.lobby import LEAD, LOBBY

MODULE = "nvflare.private.fed.app.server.server_train"

DIRECT = "fedllm.federation.server.direct:lead"
"""What a run's process does: the loop, over a line that is direct where it can be."""

GIVEN_BACK = {"MALLOC_MMAP_THRESHOLD_": str(8 << 20), "MALLOC_TRIM_THRESHOLD_": str(64 << 20)}
"""Lets the C library give back large blocks that come and go: otherwise more lie about (benchmarks.server_memory).

The pieces of a transfer are smaller and their memory is used again: to give each of them back halves the speed.
"""


def serve(folder: Path, loop: str) -> None:
    """Serve a federation until SIGTERM; runs that are wanted go on whenever their sites are there.

    Args:
        folder: what `init` made.
        loop: `module:function` that a run's job calls with the run's folder, the line, and the expected sites.
    """
    needs_flare()
    folder = folder.absolute()
    consortium = of(folder)
    try:
        with FileLock(folder / "server.lock", timeout=0), until_told() as stop, sockets() as lobby:
            # Written anew, so that the folder may have moved and sites may have been added.
            kits.server_kit(folder, consortium)
            env = {"FEDLLM_FOLDER": str(folder), "FEDLLM_LOOP": DIRECT, LEAD: loop, LOBBY: lobby, **GIVEN_BACK}
            command = [MODULE, "-m", str(folder / "server"), "-s", "fed_server.json", "--set"]
            command += ["secure_train=true", "org=fedllm", "config_folder=config"]
            keep(command, env, folder / "server" / "output.log", stop, lambda: beat(folder))
    except Timeout:
        raise FedllmError(f"A server works in '{folder}' already; stop it first.") from None
