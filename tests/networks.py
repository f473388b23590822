"""Machines for tests: network namespaces on one switch, some of them over a slow link, whose cable can be pulled."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from subprocess import PIPE
from typing import NamedTuple

import pytest

PREFIX = "fedllm-"
SWITCH = "switch"


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
    """What a machine's cable has carried, in bytes of whole frames."""

    received: int
    sent: int

    def since(self, before: Carried) -> Carried:
        """Return what came after `before`."""
        return Carried(*(now - then for now, then in zip(self, before, strict=True)))


def carried(name: str) -> Carried:
    """Count what a machine's cable has carried so far."""
    files = [f"/sys/class/net/eth0/statistics/{what}_bytes" for what in ("rx", "tx")]
    return Carried(*map(int, sh(*on(name, "cat", *files)).split()))


class Streams(NamedTuple):
    """What TCP has carried on a machine's cable, in bytes of data."""

    received: int
    sent: int
    again: int
    """Of those sent: what had been sent before."""
    missed: int
    """Frames that went by uncounted."""


@contextmanager
def listening(names: Sequence[str]) -> Iterator[Callable[[str], Streams]]:
    """Listen at the cables of machines; yield what says how much TCP has carried on one since then."""
    script = [sys.executable, str(Path(__file__).with_name("wiretap.py")), "eth0"]
    taps = {name: subprocess.Popen(on(name, *script), stdin=PIPE, stdout=PIPE, text=True, bufsize=1) for name in names}

    def heard(name: str) -> Streams:
        taps[name].stdin.write("\n")
        return Streams(*map(int, taps[name].stdout.readline().split()))

    try:
        for tap in taps.values():
            assert tap.stdout.readline() == "up\n"
        yield heard
    finally:
        for tap in taps.values():
            tap.kill()
            tap.wait()
