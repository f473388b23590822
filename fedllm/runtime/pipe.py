"""Messages of known length over a socket, a Unix one or one with TLS: nothing is joined, nothing is unpickled."""

from __future__ import annotations

import socket
from collections.abc import Callable

LENGTH = 8
"""Bytes, big-endian, that say how long the message after them is."""

SMALL = 1 << 16
"""Bytes of a message that are joined to its length, so that it goes in one packet where one is enough."""


def patient() -> None:
    """Wait for as long as it takes."""


def tell(peer: socket.socket, message: bytes, waiting: Callable[[], None] = patient) -> None:
    """Send a message; `waiting` is called whenever nothing moved for the socket's timeout, and may raise to give up.

    Raises:
        OSError: if the peer is gone.
    """
    length = len(message).to_bytes(LENGTH, "big")
    for part in [length + message] if len(message) < SMALL else [length, message]:
        rest = memoryview(part)
        while rest:
            try:
                rest = rest[peer.send(rest) :]
            except TimeoutError:
                waiting()


def hear(peer: socket.socket, largest: int, waiting: Callable[[], None] = patient) -> bytearray:
    """Return the next message; `waiting` as in `tell`.

    Raises:
        EOFError: the peer is gone.
        OSError: the socket fails, or the message has more than `largest` bytes.
    """
    size = int.from_bytes(exactly(peer, LENGTH, waiting), "big")
    if size > largest:
        raise OSError(f"a message of {size} bytes, more than {largest}")
    return exactly(peer, size, waiting)


def exactly(peer: socket.socket, size: int, waiting: Callable[[], None]) -> bytearray:
    """Return the next `size` bytes."""
    data = bytearray(size)
    rest = memoryview(data)
    while rest:
        try:
            got = peer.recv_into(rest)
        except TimeoutError:
            waiting()
            continue
        if not got:
            raise EOFError("the peer is gone")
        rest = rest[got:]
    return data
