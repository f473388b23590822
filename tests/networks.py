"""Machines for tests: network namespaces on one switch, some of them over a slow link, whose cable can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import pytest

PREFIX = "fedllm-"
SWITCH = "switch"

HEADERS = 14 + 20 + 32
"""Bytes of a frame's headers; a full one carries 1448 bytes of its 1514."""


class Slow(NamedTuple):
    """A bad link: seconds of delay one way, share of frames lost, Mbit/s."""

    delay: float
    loss: float
    mbit: float


def sh(*command: str) -> str:
    """Run a command that must succeed."""
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def why_not() -> str | None:
    """Say why there can be no namespaces here, or nothing."""
    if not sys.platform.startswith("linux") or os.geteuid() != 0:
        return "network namespaces need Linux and root"
    if not shutil.which("ip"):
        return "network namespaces need iproute2 (ip)"
    try:
        sh("ip", "netns", "add", f"{PREFIX}try")
        sh("ip", "netns", "del", f"{PREFIX}try")
        return None
    except subprocess.CalledProcessError as error:
        return f"network namespaces are not permitted here ({error.stderr.strip()})"


@contextmanager
def machines(names: Sequence[str], slow: Mapping[str, Slow] | None = None) -> Iterator[dict[str, str]]:
    """Make one namespace a name, all on one switch; yield their addresses."""
    if reason := why_not():
        pytest.skip(reason)
    relays, addresses = [], {}
    clear([*names, SWITCH])
    try:
        switch = PREFIX + SWITCH
        sh("ip", "netns", "add", switch)
        sh("ip", "-n", switch, "link", "add", "br0", "type", "bridge")
        sh("ip", "-n", switch, "link", "set", "br0", "up")
        for place, name in enumerate(names):
            space, port, addresses[name] = PREFIX + name, f"p{place}", f"10.231.7.{place + 1}"
            sh("ip", "netns", "add", space)
            if slow and name in slow:
                how = [str(number) for number in slow[name]]
                script = [sys.executable, str(Path(__file__).with_name("slow_link.py"))]
                relay = subprocess.Popen([*script, space, "eth0", switch, port, *how], stdout=subprocess.PIPE)
                relays.append(relay)
                assert relay.stdout is not None and relay.stdout.readline() == b"up\n"
            else:
                sh("ip", "link", "add", "eth0", "netns", space, "type", "veth", "peer", "name", port, "netns", switch)
            sh("ip", "-n", switch, "link", "set", port, "master", "br0", "up")
            sh("ip", "-n", space, "addr", "add", f"{addresses[name]}/24", "dev", "eth0")
            sh("ip", "-n", space, "link", "set", "eth0", "up")
            sh("ip", "-n", space, "link", "set", "lo", "up")
        yield addresses
    finally:
        for relay in relays:
            relay.kill()
            relay.wait()
        clear([*names, SWITCH])


def clear(names: Sequence[str]) -> None:
    """Remove namespaces and whatever still runs in them."""
    for name in names:
        running = subprocess.run(["ip", "netns", "pids", PREFIX + name], capture_output=True, text=True)
        for pid in running.stdout.split():
            subprocess.run(["kill", "-9", pid], capture_output=True)
        subprocess.run(["ip", "netns", "del", PREFIX + name], capture_output=True)


def on(name: str, *command: str) -> list[str]:
    """Return the command as it runs on a machine."""
    return ["ip", "netns", "exec", PREFIX + name, *command]


def cut(name: str) -> None:
    """Pull a machine's cable."""
    sh("ip", "-n", PREFIX + name, "link", "set", "eth0", "down")


def mend(name: str) -> None:
    """Plug a machine's cable in again."""
    sh("ip", "-n", PREFIX + name, "link", "set", "eth0", "up")


class Carried(NamedTuple):
    """What a machine's cable has carried, and what its TCP had to say twice."""

    received: int
    """Bytes of whole frames."""
    sent: int
    frames_in: int
    frames_out: int
    again: int
    """Segments that were sent again."""

    def since(self, before: Carried) -> Carried:
        """Return what came after `before`."""
        return Carried(*(now - then for now, then in zip(self, before, strict=True)))

    def streams(self) -> tuple[int, int]:
        """Return the bytes received and sent less the headers of Ethernet, IP and TCP (with its timestamps)."""
        return self.received - HEADERS * self.frames_in, self.sent - HEADERS * self.frames_out


def carried(name: str) -> Carried:
    """Count what a machine's cable has carried so far."""
    counts = "/sys/class/net/eth0/statistics/"
    files = [f"{counts}{what}" for what in ("rx_bytes", "tx_bytes", "rx_packets", "tx_packets")]
    *numbers, tcp = sh(*on(name, "cat", *files, "/proc/net/snmp")).split("\n", 4)
    names, values = (line.split() for line in tcp.splitlines() if line.startswith("Tcp:"))
    return Carried(*map(int, numbers), int(values[names.index("RetransSegs")]))
