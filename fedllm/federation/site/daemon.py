"""The site's daemon: its desk behind a Unix socket, and FLARE's client process kept alive beside it.

Job processes of FLARE come and go and pass bytes to the socket; the desk and what it holds stay.
"""

from __future__ import annotations

import contextlib
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.core.errors import FedllmError
from fedllm.federation import kits
from fedllm.federation.health import beat
from fedllm.federation.keep import keep, needs_flare, sockets, until_told
from fedllm.federation.site.front import Front, converse

MODULE = "nvflare.private.fed.app.client.client_train"

VERDICT = 2.0
"""Seconds in which a server says that it refuses a certificate."""


def start(name: str, kit: Path, state: Path, answer: Callable[[bytes | bytearray], bytes]) -> None:
    """Connect a site to its server and answer what comes, until SIGTERM.

    Args:
        name: the site's name.
        kit: what `join` made.
        state: where the daemon writes its heartbeat and what FLARE prints.
        answer: the desk; called from many threads.
    """
    needs_flare()
    kit, state = kit.absolute(), state.absolute()
    if not (kit / "startup" / "fed_client.json").exists():
        raise FedllmError(f"'{kit}' has no approval yet; `fedllm site join {name}.approved` puts it there.")
    state.mkdir(parents=True, exist_ok=True)
    with until_told() as stop, listening(Front(kit, answer).answer) as desk:
        command = [MODULE, "-m", str(kit), "-s", "fed_client.json", "--set"]
        command += ["secure_train=true", f"uid={name}", "org=fedllm", "config_folder=config"]
        command += [f"heart_beat_interval={kits.HEARTBEAT}"]
        keep(command, {"FEDLLM_DESK": desk}, state / "output.log", stop, lambda: beat(state))


def reach(kit: Path) -> None:
    """See that the server can be reached from here and does not refuse the site's certificate.

    Raises:
        FedllmError: with the reason why not; it may pass.
    """
    needs_flare()
    from fedllm.federation.dial import knock, server_of

    knock(*server_of(kit), kit / "startup", verdict=VERDICT)


@contextmanager
def listening(answer: Callable[[bytes | bytearray], bytes]) -> Iterator[str]:
    """Yield the path of a Unix socket that only this user can reach, behind which `answer` answers."""
    with sockets() as folder, socket.socket(socket.AF_UNIX) as listener:
        path = f"{folder}/desk"
        listener.bind(path)
        listener.listen(64)
        threading.Thread(target=accept, args=(listener, answer), daemon=True).start()
        try:
            yield path
        finally:
            # Closing alone would leave the thread in its call.
            with contextlib.suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def accept(listener: socket.socket, answer: Callable[[bytes | bytearray], bytes]) -> None:
    """Give every connection a thread, until the listener is closed."""
    while True:
        try:
            connection, _ = listener.accept()
        except OSError:
            return
        threading.Thread(target=converse, args=(connection, answer), daemon=True).start()
