"""The site's daemon: its desk behind a Unix socket, and FLARE's client process kept alive beside it.

Job processes of FLARE come and go and pass bytes to the socket; the desk and what it holds stay.
"""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fedllm.core.errors import FedllmError, Refused
from fedllm.federation import kits
from fedllm.federation.health import beat
from fedllm.federation.keep import keep, sockets, until_told
from fedllm.federation.serve import needs_flare
from fedllm.runtime.line import Head, decode, encode
from fedllm.runtime.pipe import hear, tell

MODULE = "nvflare.private.fed.app.client.client_train"

VERDICT = 2.0
"""Seconds in which a server says that it refuses a certificate."""

MOST_RUNS = 16
"""Runs that the daemon is connected to directly; the server has no more at once."""

LARGEST_MESSAGE = 32 << 20
"""Bytes that a message to the desk may have; the largest chunk is half of that."""


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


def converse(connection: socket.socket, answer: Callable[[bytes | bytearray], bytes]) -> None:
    """Answer one peer until it goes; bytes go in and out, nothing is ever unpickled."""
    with connection, contextlib.suppress(OSError, EOFError):
        while True:
            tell(connection, answer(hear(connection, LARGEST_MESSAGE)))


class Front:
    """What the desk is reached through: it dials a run at the server when the server asks for it, and answers there."""

    def __init__(self, kit: Path, answer: Callable[[bytes | bytearray], bytes]) -> None:
        self.kit, self.desk, self.lock = kit, answer, threading.Lock()
        self.dialled: dict[str, socket.socket] = {}

    def answer(self, data: bytes | bytearray) -> bytes:
        """Answer a message of the server: dial, or have the desk answer."""
        with contextlib.suppress(Refused):
            head, _ = decode(data)
            if head.get("do") == "dial":
                return encode(self.dial(head.get("name")))
        return self.desk(data)

    def dial(self, name: object) -> Head:
        """Connect to the run that waits under this name, in place of a connection that may have died unnoticed."""
        from fedllm.federation.dial import dialled

        if not isinstance(name, str) or not re.fullmatch("[0-9a-f]{32}", name):
            return {"error": "'name' is not 32 hexadecimal digits", "rule": ""}
        try:
            connection = dialled(self.kit, name)
        except FedllmError as problem:
            return {"error": str(problem), "rule": ""}
        with self.lock:
            before = self.dialled.pop(name, None)
            if len(self.dialled) >= MOST_RUNS:
                before = before or self.dialled.pop(next(iter(self.dialled)))
            self.dialled[name] = connection
        if before:
            with contextlib.suppress(OSError):
                before.shutdown(socket.SHUT_RDWR)
        threading.Thread(target=converse, args=(connection, self.desk), daemon=True).start()
        return {"dialled": name}
