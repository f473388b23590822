"""The one port that all come to: a connection that is for a run's own process goes there before its first byte is read.

The port is that of the engine's server process. A run's process waits behind a Unix socket in a folder that both know,
the lobby; the socket's name is what a site asks for in its TLS greeting (ALPN, RFC 7301). The greeting is only looked
at: whom the connection is passed to shakes hands itself, so its bytes go through no process between.
"""

from __future__ import annotations

import errno
import os
import socket
import ssl
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path

LOBBY, LEAD = "FEDLLM_LOBBY", "FEDLLM_LEAD"
"""The environment of the server's processes: where the lobby is, and the loop of a run's process that waits there."""

GREETING = 1 << 14
"""Bytes that a greeting may have; one has some hundreds, and a TLS record no more than this."""

LOOK = 0.02


def server_context(startup: Path, names: Sequence[str] = ()) -> ssl.SSLContext:
    """Return how a federation's server shakes hands: TLS 1.3, a certificate of the federation asked of the peer."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=startup / "rootCA.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.load_cert_chain(startup / "server.crt", startup / "server.key")
    if names:
        context.set_alpn_protocols(list(names))
    return context


def passed_on(peer: ssl.SSLSocket, lobby: Path, startup: Path, seconds: float) -> bool:
    """Pass a connection on that asks for one who waits in the lobby; if it does not, nothing of it was read.

    Raises:
        OSError: if it does not greet within so many seconds, or whom it asks for has just gone.
    """
    names = sorted(path.name for path in lobby.glob("*"))
    if not names or not (name := asked_for(peer, server_context(startup, names), seconds)):
        return False
    with socket.socket(socket.AF_UNIX) as waiting:
        waiting.settimeout(seconds)
        waiting.connect(str(lobby / name))
        socket.send_fds(waiting, [b"."], [peer.fileno()])
    # Closed here without a word: it lives on where it went.
    os.close(peer.detach())
    return True


def asked_for(peer: ssl.SSLSocket, context: ssl.SSLContext, seconds: float) -> str:
    """Return which of the context's protocols a connection asks for, or "" for none, and leave its greeting unread."""
    until, before = time.monotonic() + seconds, 0
    while True:
        # A socket that will speak TLS refuses to peek; the one below it does not.
        greeting = socket.socket.recv(peer, GREETING, socket.MSG_PEEK)
        if len(greeting) in (0, GREETING):
            return ""
        if len(greeting) == before:
            if time.monotonic() > until:
                raise TimeoutError("it does not greet")
            time.sleep(LOOK)
            continue
        before = len(greeting)
        heard, said = ssl.MemoryBIO(), ssl.MemoryBIO()
        heard.write(greeting)
        trial = context.wrap_bio(heard, said, server_side=True)
        try:
            trial.do_handshake()
        except ssl.SSLWantReadError:
            # Once there is an answer, the greeting was whole.
            if said.pending:
                return trial.selected_alpn_protocol() or ""
        except ssl.SSLError:
            return ""


@contextmanager
def waiting_in(lobby: Path, name: str) -> Iterator[socket.socket]:
    """Yield the listening socket of one who waits in the lobby under this name."""
    # What clears /tmp of old files may have taken it while nobody waited.
    lobby.mkdir(mode=0o700, exist_ok=True)
    for path in lobby.iterdir():
        # A process that was killed took nothing with it.
        with socket.socket(socket.AF_UNIX) as other, suppress(FileNotFoundError):
            if other.connect_ex(str(path)) == errno.ECONNREFUSED:
                path.unlink()
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(lobby / name))
        listener.listen(64)
        try:
            yield listener
        finally:
            (lobby / name).unlink(missing_ok=True)
            with suppress(OSError):
                listener.shutdown(socket.SHUT_RDWR)


def passed(listener: socket.socket) -> socket.socket:
    """Return the next connection that is passed on; raise `OSError` when the listener is closed."""
    while True:
        port, _ = listener.accept()
        with port:
            port.settimeout(1.0)
            with suppress(OSError):
                for place in socket.recv_fds(port, 1, 1)[1]:
                    return socket.socket(fileno=place)
