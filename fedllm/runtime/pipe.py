"""Messages of known length over a Unix socket: one copy into the kernel and one out of it, nothing is unpickled."""

from __future__ import annotations

import socket

LENGTH = 8
"""Bytes, big-endian, that say how long the message after them is."""


def tell(peer: socket.socket, message: bytes) -> None:
    """Send a message; raise `OSError` if the peer is gone."""
    peer.sendall(len(message).to_bytes(LENGTH, "big"))
    peer.sendall(message)


def hear(peer: socket.socket, largest: int) -> bytes:
    """Return the next message.

    Raises:
        EOFError: the peer is gone.
        OSError: the socket fails, or the message has more than `largest` bytes.
    """
    size = int.from_bytes(exactly(peer, LENGTH), "big")
    if size > largest:
        raise OSError(f"a message of {size} bytes, more than {largest}")
    return exactly(peer, size)


def exactly(peer: socket.socket, size: int) -> bytes:
    """Return the next `size` bytes."""
    # One call for all of them: read piece by piece they would be joined, which is a copy more.
    data = peer.recv(size, socket.MSG_WAITALL)
    while len(data) < size:
        if not (more := peer.recv(size - len(data), socket.MSG_WAITALL)):
            raise EOFError("the peer is gone")
        data += more
    return data
