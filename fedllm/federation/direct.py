"""A run's line to its sites, direct where it can be: over a connection between the run's process and a site's daemon.

The engine carries a message through four processes, which is what large transfers take their time for. So a site is
asked, by the engine's line, to dial the server's port for this run. Calls then go over that connection while it is
free and works, and by the engine where a network lets no second connection through.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

from fedllm.core.errors import Refused
from fedllm.federation.lobby import LEAD, LOBBY, passed, server_context, waiting_in
from fedllm.federation.tls import HANDSHAKE, proven
from fedllm.runtime.flare import FOLDER, LARGEST_ANSWER, load
from fedllm.runtime.line import Aborted, Body, Head, Line, Unreachable, decode, encode
from fedllm.runtime.pipe import hear, tell

LOOK = 0.5
"""Seconds after which a call that waits looks whether the run is over."""

AGAIN = 10.0
"""Seconds after which a site that has no connection is asked for one again."""

GREETINGS = 32
"""Connections that may prove themselves at once."""

log = logging.getLogger("fedllm.direct")


def lead(folder: Path, line: Line, expected: Sequence[str]) -> None:
    """Run a run's loop over its line, direct where it can be."""
    with directly(line, Path(os.environ[FOLDER]), Path(os.environ[LOBBY])) as nearer:
        load(os.environ[LEAD])(folder, nearer, expected)


@contextmanager
def directly(line: Line, federation: Path, lobby: Path) -> Iterator[Line]:
    """Yield a line whose calls go over a connection with the site where there is one, and else over `line`."""
    name = secrets.token_hex(16)
    direct = Direct(line, federation, name)
    with waiting_in(lobby, name) as listener:
        threading.Thread(target=direct.receive, args=(listener,), daemon=True).start()
        try:
            yield line._replace(call=direct.call)
        finally:
            direct.close()


class Direct:
    """The connections of a run with its sites, one each; threads may share it."""

    def __init__(self, line: Line, federation: Path, name: str) -> None:
        self.line, self.federation, self.name = line, federation, name
        self.context = server_context(federation / "server" / "startup", [name])
        self.lock, self.over = threading.Lock(), False
        self.free: dict[str, ssl.SSLSocket] = {}
        self.invited: dict[str, float] = {}
        self.greeting = threading.BoundedSemaphore(GREETINGS)

    def close(self) -> None:
        """Let go of what is free; what is in a call ends with it."""
        with self.lock:
            self.over = True
            left = list(self.free.values())
            self.free.clear()
        for connection in left:
            connection.close()

    def call(self, site: str, head: Head, body: bytes, seconds: float) -> tuple[Head, Body]:
        """Call a site, as a line does."""
        self.line.check()
        with self.lock:
            connection = self.free.pop(site, None)
        if connection is None:
            self.invite(site)
            return self.line.call(site, head, body, seconds)
        due = time.monotonic() + seconds

        def waiting() -> None:
            self.line.check()
            if time.monotonic() > due:
                raise TimeoutError(f"no answer within {seconds:g} s")

        try:
            tell(connection, encode(head, body), waiting)
            answer = decode(hear(connection, LARGEST_ANSWER, waiting))
        except (OSError, EOFError, Refused) as error:
            log.warning("the connection with %s ended: %s", site, error)
            self.line.check()
            raise Unreachable(f"{site} does not answer ({error})") from error
        else:
            connection = self.kept(site, connection)
        finally:
            if connection:
                connection.close()
        self.line.check()
        return answer

    def kept(self, site: str, connection: ssl.SSLSocket) -> ssl.SSLSocket | None:
        """Keep a connection for a site's next call; return the one that is now too many."""
        with self.lock:
            if self.over:
                return connection
            before, self.free[site] = self.free.get(site), connection
            return before

    def invite(self, site: str) -> None:
        """Ask a site to dial, unless it was asked a moment ago."""
        now = time.monotonic()
        with self.lock:
            if now < self.invited.get(site, now):
                return
            self.invited[site] = now + AGAIN
        threading.Thread(target=self.ask, args=(site,), daemon=True).start()

    def ask(self, site: str) -> None:
        """Ask a site to dial; whether it did is seen when it has."""
        with suppress(Unreachable, Aborted):
            answer, _ = self.line.call(site, {"do": "dial", "name": self.name}, b"", 15.0)
            if "error" in answer:
                log.warning("%s is called by the engine alone: %.200s", site, answer["error"])

    def receive(self, listener: socket.socket) -> None:
        """Take connections that the port passes on, until the listener is closed."""
        while True:
            try:
                peer = passed(listener)
            except OSError:
                return
            if not self.greeting.acquire(blocking=False):
                peer.close()
                continue
            threading.Thread(target=self.greet, args=(peer,), daemon=True).start()

    def greet(self, peer: socket.socket) -> None:
        """Have a peer prove who it is, and keep its connection if it is a site of this run."""
        try:
            peer.settimeout(HANDSHAKE)
            connection = self.context.wrap_socket(peer, server_side=True, do_handshake_on_connect=False)
            site, _ = proven(connection, self.federation)
            if site not in self.line.sites():
                raise ssl.SSLError(f"'{site}' is no site of this run")
        except (OSError, ValueError) as error:
            log.warning("refused a connection to the run: %s", error)
            peer.close()
            return
        finally:
            self.greeting.release()
        connection.settimeout(LOOK)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        log.info("%s is called directly", site)
        if before := self.kept(site, connection):
            before.close()
