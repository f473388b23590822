"""Counts what TCP carries on a network device, by the headers of its frames: data, and data that was sent before.

Run as `python wiretap.py DEVICE`. It says `up`; to each line that it is sent it answers with one line of four numbers:
bytes of data received and sent, bytes of those sent that had been sent before, and frames that went by uncounted.
"""

from __future__ import annotations

import socket
import struct
import sys
import threading

ETH_P_ALL, SO_RCVBUFFORCE, SOL_PACKET, PACKET_STATISTICS = 3, 33, 263, 6
BUFFER = 64 << 20
"""Bytes of frames that may wait to be counted."""

HEADERS = 128
"""Bytes of a frame that are looked at."""


class Counts:
    """What went by so far."""

    def __init__(self) -> None:
        self.received = self.sent = self.again = 0
        self.told = dict[bytes, int]()
        """Of each connection: the number of the byte after the last that was sent."""

    def add(self, frame: memoryview, outgoing: bool) -> None:
        """Count the data in one frame; whatever is not TCP over IPv4 has none."""
        if frame[12:14] != b"\x08\x00" or frame[23] != socket.IPPROTO_TCP:
            return
        tcp = 14 + (frame[14] & 15) * 4
        size = int.from_bytes(frame[16:18], "big") - (tcp - 14) - (frame[tcp + 12] >> 4) * 4
        if not outgoing:
            self.received += size
            return
        self.sent += size
        connection, first = bytes(frame[26:34]) + bytes(frame[tcp : tcp + 4]), int.from_bytes(frame[tcp + 4 : tcp + 8])
        # Numbers of bytes begin anew after 4 GiB, and with each connection.
        begins = frame[tcp + 13] & 2
        before = first if begins else self.told.get(connection, first)
        known = (before - first + (1 << 31)) % (1 << 32) - (1 << 31)
        self.again += min(max(known, 0), size)
        self.told[connection] = (first + max(size, known) + bool(begins)) % (1 << 32)


def listen(device: str, counts: Counts) -> socket.socket:
    """Count in a thread, and return the socket that it listens to."""
    wire = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    wire.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    wire.bind((device, ETH_P_ALL))

    def count() -> None:
        frame = memoryview(bytearray(HEADERS))
        while True:
            _, address = wire.recvfrom_into(frame)
            counts.add(frame, address[2] == socket.PACKET_OUTGOING)

    threading.Thread(target=count, daemon=True).start()
    return wire


if __name__ == "__main__":
    counts, missed = Counts(), 0
    wire = listen(sys.argv[1], counts)
    print("up", flush=True)
    for _ in sys.stdin:
        missed += struct.unpack("II", wire.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))[1]
        print(counts.received, counts.sent, counts.again, missed, flush=True)
