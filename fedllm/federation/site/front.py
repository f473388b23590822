"""What a site's desk is reached through: the engine's processes, and connections dialled to runs at the server."""

from __future__ import annotations

import contextlib
import re
import socket
import threading
from collections.abc import Callable
from pathlib import Path

from fedllm.core.errors import FedllmError, Refused
from fedllm.runtime.line import Head, decode, encode
from fedllm.runtime.pipe import hear, tell

MOST_RUNS = 16
"""Runs that a site is connected to directly; the server has no more at once."""

LARGEST_MESSAGE = 32 << 20
"""Bytes that a message to the desk may have; the largest chunk is half of that."""


class Front:
    """Passes messages on to the desk, and dials a run at the server when the server asks for it."""

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


def converse(connection: socket.socket, answer: Callable[[bytes | bytearray], bytes]) -> None:
    """Answer one peer until it goes; bytes go in and out, nothing is ever unpickled."""
    with connection, contextlib.suppress(OSError, EOFError):
        while True:
            tell(connection, answer(hear(connection, LARGEST_MESSAGE)))
