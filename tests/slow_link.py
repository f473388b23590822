"""A slow link between two network namespaces, where the kernel has no netem: frames over two TAP devices, made to wait.

Run as `python slow_link.py NEAR DEVICE FAR DEVICE SECONDS LOSS MBIT`; both ways alike. It says `up` and
relays until it is killed.
"""

from __future__ import annotations

import ctypes
import fcntl
import os
import random
import struct
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path
from queue import Full, Queue

TUNSETIFF, TAP_NO_INFO, NEWNET = 0x400454CA, 0x0002 | 0x1000, 0x40000000
QUEUE_BYTES_SECONDS = 0.5
"""A sender that is faster than the link fills the link's buffer; what goes beyond it is lost, as on a real one."""


def tap(space: str, device: str) -> int:
    """Make a TAP device in a namespace and return its file."""
    with Path(f"/run/netns/{space}").open("rb") as file:
        if ctypes.CDLL(None, use_errno=True).setns(file.fileno(), NEWNET):
            raise OSError(ctypes.get_errno(), f"setns {space}")
    number = os.open("/dev/net/tun", os.O_RDWR)
    fcntl.ioctl(number, TUNSETIFF, struct.pack("16sH", device.encode(), TAP_NO_INFO))
    return number


def carry(source: int, target: int, delay: float, loss: float, mbit: float) -> None:
    """Carry frames one way, each `delay` seconds late, some lost, at a rate."""
    frames: Queue[tuple[float, bytes]] = Queue(4096)
    free = 0.0

    def deliver() -> None:
        while True:
            due, frame = frames.get()
            time.sleep(max(0.0, due - time.monotonic()))
            # Where the cable is pulled the frame is lost.
            with suppress(OSError):
                os.write(target, frame)

    threading.Thread(target=deliver, daemon=True).start()
    chance = random.Random(0)
    while True:
        try:
            frame, now = os.read(source, 65536), time.monotonic()
        except OSError:
            time.sleep(0.05)
            continue
        if chance.random() < loss or free - now > QUEUE_BYTES_SECONDS:
            continue
        free = max(now, free) + len(frame) * 8 / (mbit * 1e6)
        try:
            frames.put_nowait((free + delay, frame))
        except Full:
            continue


if __name__ == "__main__":
    near, near_device, far, far_device, *how = sys.argv[1:]
    delay, loss, mbit = map(float, how)
    a, b = tap(near, near_device), tap(far, far_device)
    # A busy machine must not look like a worse link.
    with suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_RR, os.sched_param(1))
    print("up", flush=True)
    threading.Thread(target=carry, args=(a, b, delay, loss, mbit), daemon=True).start()
    carry(b, a, delay, loss, mbit)
