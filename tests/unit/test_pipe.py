"""Messages over a Unix socket."""

from __future__ import annotations

import socket
import threading

import pytest

from fedllm.runtime.pipe import hear, tell


@pytest.mark.parametrize("size", [0, 1, 5_000_000])
def test_what_is_heard_is_what_was_told_one_message_after_the_other(size):
    here, there = socket.socketpair()
    messages = [bytes([number]) * size for number in range(3)]
    speaker = threading.Thread(target=lambda: [tell(here, message) for message in messages])
    speaker.start()
    assert [hear(there, size) for _ in messages] == messages
    speaker.join()


def test_a_message_that_is_too_long_is_never_read():
    here, there = socket.socketpair()
    here.sendall((1 << 60).to_bytes(8, "big"))
    with pytest.raises(OSError, match="more than 1000"):
        hear(there, 1000)


@pytest.mark.parametrize("said", [b"", b"\0\0\0", (10).to_bytes(8, "big") + b"half"])
def test_a_peer_that_goes_in_mid_message_is_the_end(said):
    here, there = socket.socketpair()
    here.sendall(said)
    here.close()
    with pytest.raises(EOFError):
        hear(there, 1000)
