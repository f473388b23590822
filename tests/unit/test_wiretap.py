"""What the tests of networks count of TCP, on frames made by hand."""

from __future__ import annotations

from tests.wiretap import Counts

SYN, OPTIONS = 2, 12


def frame(first, size, port=40000, flags=0, options=OPTIONS):
    """The headers of an Ethernet frame with TCP over IPv4, whose data are cut off."""
    ip = bytes([0x45, 0]) + (20 + 20 + options + size).to_bytes(2, "big") + bytes(5) + b"\x06" + bytes(2)
    tcp = port.to_bytes(2, "big") + (8002).to_bytes(2, "big") + (first % 2**32).to_bytes(4, "big") + bytes(4)
    tcp += bytes([(20 + options) // 4 << 4, flags]) + bytes(6 + options)
    return memoryview(bytes(12) + b"\x08\x00" + ip + bytes([10, 0, 0, 1, 10, 0, 0, 2]) + tcp)


def test_data_are_counted_without_headers_and_once_more_where_they_are_sent_again():
    counts, start = Counts(), 2**32 - 1001
    counts.add(frame(start, 0, flags=SYN), True)
    for first, size in [(1, 1000), (1001, 500), (501, 700), (1, 1000), (1501, 10), (0, 0)]:
        counts.add(frame(start + first, size, options=OPTIONS + 12), True)
    assert (counts.sent, counts.again) == (3210, 1700)
    counts.add(frame(7, 100, port=40001), True)
    assert (counts.sent, counts.again, counts.received) == (3310, 1700, 0)


def test_what_comes_in_and_what_is_not_tcp():
    counts = Counts()
    counts.add(frame(0, 300), False)
    counts.add(memoryview(bytes(12) + b"\x08\x06" + bytes(46)), False)
    assert (counts.received, counts.sent) == (300, 0)
