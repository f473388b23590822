"""Whether a daemon is alive: it touches a heartbeat file in its state folder, and anybody may look at its age."""

from __future__ import annotations

import os
import socket
import time
from pathlib import Path

from fedllm.core.errors import FedllmError

BEAT = 5.0
"""Seconds within which a daemon beats again."""

STALE = 30.0
"""Seconds after which a heartbeat is one of a daemon that is dead or stuck."""


def beat(state: Path) -> None:
    """Touch the heartbeat in a state folder and tell systemd's watchdog, where there is one.

    Call it from the loop that does the daemon's work, never from a thread of its own, which would outlive a stuck loop.
    """
    address = os.environ.get("NOTIFY_SOCKET", "")
    try:
        (state / "heartbeat").touch()
        if address:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as notify:
                notify.sendto(b"WATCHDOG=1", "\0" + address[1:] if address.startswith("@") else address)
    except OSError as error:
        raise FedllmError(f"The daemon of {state} cannot show that it lives ({error}); check that folder.") from error


def healthy(state: Path) -> str | None:
    """Return None when the daemon of this state folder beats, else the reason why it is taken for dead."""
    heartbeat = state / "heartbeat"
    try:
        age = time.time() - heartbeat.stat().st_mtime
    except OSError as error:
        return f"{heartbeat} cannot be read ({error.strerror}); the daemon has not started."
    if abs(age) <= STALE:  # a beat far in the future is one from before the clock was set back
        return None
    return f"{heartbeat} was touched {age:.0f} s ago, which is more than {STALE:.0f} s; the daemon is dead or stuck."
