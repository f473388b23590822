"""A run's line to its sites, direct where it can be: over a connection between the run's process and a site's daemon.

The engine carries a message through four processes, which is what large transfers take their time for. So a site is
asked, by the engine's line, to dial the server's port for this run. Calls then go over that connection while it is
free and works, and by the engine where a network lets no second connection through.
"""

from __future__ import annotations

import logging
import math
import os
import secrets
import socket
import ssl
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fedllm.core.errors import Refused
from fedllm.federation.members import revoked
from fedllm.federation.server.connected import Connected, Connection
from fedllm.federation.server.lobby import LEAD, LOBBY, passed, server_context, waiting_in
from fedllm.federation.server.tls import HANDSHAKE, proven
from fedllm.runtime.flare import FOLDER, LARGEST_ANSWER, load
from fedllm.runtime.line import Aborted, Body, Head, Line, Unreachable, decode, encode
from fedllm.runtime.pipe import hear, tell

LOOK = 0.5
"""Seconds after which a call that waits looks whether the run is over."""

AGAIN, REFUSED = 10.0, 300.0
"""Seconds after which a site that has no connection is asked for one again, and one that said that it cannot."""

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
            direct.connected.close()


class Direct:
    """How a run calls its sites; threads may share it."""

    def __init__(self, line: Line, federation: Path, name: str) -> None:
        self.line, self.federation, self.name = line, federation, name
        self.context = server_context(federation / "server" / "startup", [name])
        self.connected = Connected()
        self.lock, self.invite_after = threading.Lock(), dict[str, float]()
        self.greetings = threading.BoundedSemaphore(GREETINGS)

    def call(self, site: str, head: Head, body: bytes, seconds: float) -> tuple[Head, Body]:
        """Call a site, as a line does."""
        self.line.check()
        connection = self.taken(site)
        if connection is None:
            return self.line.call(site, head, body, seconds)
        due, whole = time.monotonic() + seconds, False

        def waiting() -> None:
            self.line.check()
            if time.monotonic() > due:
                raise TimeoutError(f"no answer within {seconds:g} s")

        try:
            tell(connection.socket, encode(head, body), waiting)
            answer = decode(hear(connection.socket, LARGEST_ANSWER, waiting))
            whole = True
        except (OSError, EOFError, Refused) as error:
            self.line.check()
            log.warning("the connection with %s ended: %s", site, error)
            raise Unreachable(f"{site} does not answer ({error})") from error
        finally:
            self.connected.give_back(site, connection, whole)
        self.line.check()
        return answer

    def taken(self, site: str) -> Connection | None:
        """Return a site's connection if a call may use it; a site that has none is asked for one."""
        connection = self.connected.take(site)
        if connection and connection.serial in revoked(self.federation)["serials"]:
            log.warning("cut the connection with %s, whose certificate was revoked", site)
            self.connected.give_back(site, connection, whole=False)
            return None
        if site not in self.connected:
            self.invite(site)
        return connection

    def invite(self, site: str) -> None:
        """Ask a site to dial, unless that is being done or was a moment ago."""
        now = time.monotonic()
        with self.lock:
            if now < self.invite_after.get(site, now):
                return
            self.invite_after[site] = math.inf
        threading.Thread(target=self.ask, args=(site,), daemon=True).start()

    def ask(self, site: str) -> None:
        """Ask a site to dial; whether it did is seen when it has."""
        pause = AGAIN
        try:
            answer, _ = self.line.call(site, {"do": "dial", "name": self.name}, b"", 15.0)
            if "error" in answer:
                log.warning("%s is called by the engine alone: %.200s", site, answer["error"])
                pause = REFUSED
        except (Unreachable, Aborted) as error:
            log.info("%s was not asked to dial: %s", site, error)
        finally:
            with self.lock:
                self.invite_after[site] = time.monotonic() + pause

    def receive(self, listener: socket.socket) -> None:
        """Take connections that the port passes on, until the listener is closed."""
        while True:
            try:
                peer = passed(listener)
            except OSError:
                return
            if not self.greetings.acquire(blocking=False):
                peer.close()
                continue
            threading.Thread(target=self.greet, args=(peer,), daemon=True).start()

    def greet(self, peer: socket.socket) -> None:
        """Have a peer prove who it is, and keep its connection if it is a site of this run."""
        connection = peer
        try:
            peer.settimeout(HANDSHAKE)
            connection = secured = self.context.wrap_socket(peer, server_side=True, do_handshake_on_connect=False)
            site, serial = proven(secured, self.federation)
            if site not in self.line.sites():
                raise ssl.SSLError(f"'{site}' is no site of this run")
            secured.settimeout(LOOK)
            secured.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            log.info("%s is called directly", site)
            self.connected.put(site, Connection(secured, serial))
        except (OSError, ValueError) as error:
            log.warning("refused a connection to the run: %s", error)
            connection.close()
        finally:
            self.greetings.release()
