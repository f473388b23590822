"""The one port: who asks for a run's process is passed on to it whole, and nobody else's bytes are touched."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.federation.server.lobby import asked_for, passed, passed_on, server_context, waiting_in
from tests.certified import client_context, made

NAME = "ab" * 16


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return made(tmp_path_factory.mktemp("federation"), ["a"])


@pytest.fixture
def lobby(tmp_path):
    (tmp_path / "lobby").mkdir()
    return tmp_path / "lobby"


@contextmanager
def connection(federation):
    """Both ends of a connection to the port: the peer's, and the server's, on which no byte was read yet."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        peer = socket.create_connection(listener.getsockname())
        plain, _ = listener.accept()
        context = server_context(federation.startup)
        with peer, context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False) as server:
            server.settimeout(3)
            yield peer, server


def greeting(federation, names):
    """The first bytes of a peer that asks for these protocols."""
    heard, said = ssl.MemoryBIO(), ssl.MemoryBIO()
    with suppress(ssl.SSLWantReadError):
        client_context(federation, names).wrap_bio(heard, said, server_hostname="127.0.0.1").do_handshake()
    return said.read()


@pytest.mark.parametrize(("asked", "found"), [([NAME], NAME), (["other", NAME], NAME), (["other"], ""), ([], "")])
def test_whom_a_peer_asks_for_is_read_from_its_greeting_and_the_greeting_stays(federation, asked, found):
    context, hello = server_context(federation.startup, ["00" * 16, NAME]), greeting(federation, asked)
    with connection(federation) as (peer, server):
        # In two pieces, as a network may bring it.
        threading.Timer(0.2, peer.sendall, [hello[100:]]).start()
        peer.sendall(hello[:100])
        assert asked_for(server, context, 3) == found
        assert socket.socket.recv(server, 1 << 16) == hello


@pytest.mark.parametrize("said", [b"GET / HTTP/1.1\r\n\r\n", b"\x16\x03\x01\x00\x05hello", b"\x16" * (1 << 15)])
def test_what_is_no_greeting_asks_for_nobody(federation, said):
    with connection(federation) as (peer, server):
        peer.sendall(said)
        assert asked_for(server, server_context(federation.startup, [NAME]), 3) == ""


@given(places=st.lists(st.tuples(st.integers(0, 600), st.integers(0, 255)), max_size=8), cut=st.integers(0, 600))
def test_a_mangled_greeting_asks_for_whom_it_did_or_nobody(federation, places, cut):
    hello = bytearray(greeting(federation, [NAME]))
    for place, value in places:
        hello[place % len(hello)] = value
    here, there = socket.socketpair()
    with here, there:
        there.sendall(hello[:cut])
        there.shutdown(socket.SHUT_WR)
        with suppress(TimeoutError):
            assert asked_for(here, server_context(federation.startup, [NAME]), 0) in ("", NAME)


@pytest.mark.parametrize("said", [b"", b"\x16", b"\x16\x03\x01\x02\x00\x01"])
def test_who_stops_within_a_greeting_is_given_up_in_time(federation, said):
    with connection(federation) as (peer, server):
        peer.sendall(said)
        server.settimeout(0.3)
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            asked_for(server, server_context(federation.startup, [NAME]), 0.3)
        assert time.monotonic() - begun < 2


def test_a_connection_that_is_passed_on_is_shaken_hands_with_where_it_went(federation, lobby):
    said = []

    def run(listener):
        with server_context(federation.startup, [NAME]).wrap_socket(passed(listener), server_side=True) as peer:
            said.append((peer.selected_alpn_protocol(), peer.recv(5), peer.version()))
            peer.sendall(b"there")

    def site(peer):
        with client_context(federation, [NAME]).wrap_socket(peer, server_hostname="127.0.0.1") as secured:
            secured.sendall(b"hello")
            said.append(secured.recv(5))

    with waiting_in(lobby, NAME) as listener, connection(federation) as (peer, server):
        threads = [threading.Thread(target=run, args=(listener,)), threading.Thread(target=site, args=(peer,))]
        for thread in threads:
            thread.start()
        assert passed_on(server, lobby, federation.startup, 3)
        assert server.fileno() == -1
        for thread in threads:
            thread.join(5)
    assert said == [(NAME, b"hello", "TLSv1.3"), b"there"]
    assert not list(lobby.iterdir())


def test_who_asks_for_nobody_who_waits_is_the_ports_own(federation, lobby):
    with connection(federation) as (peer, server):
        peer.sendall(greeting(federation, [NAME]))
        assert not passed_on(server, lobby, federation.startup, 3)
        with waiting_in(lobby, "00" * 16):
            assert not passed_on(server, lobby, federation.startup, 3)


def test_a_lobby_that_was_cleared_away_is_nobodys_trouble(federation, tmp_path):
    with connection(federation) as (peer, server):
        peer.sendall(greeting(federation, [NAME]))
        assert not passed_on(server, tmp_path / "gone", federation.startup, 3)
        with waiting_in(tmp_path / "gone", NAME) as listener:
            assert passed_on(server, tmp_path / "gone", federation.startup, 3)
            passed(listener).close()
        assert (tmp_path / "gone").stat().st_mode & 0o777 == 0o700


def test_what_a_killed_process_left_in_the_lobby_is_cleared_and_the_living_stay(lobby):
    with socket.socket(socket.AF_UNIX) as killed:
        killed.bind(str(lobby / "killed"))
    with waiting_in(lobby, "first") as first, waiting_in(lobby, "second"):
        assert sorted(path.name for path in lobby.iterdir()) == ["first", "second"]
        with socket.socket() as some, socket.socket(socket.AF_UNIX) as port:
            port.connect(str(lobby / "first"))
            socket.send_fds(port, [b"."], [some.fileno()])
            # The look of the second brought nothing and is passed over.
            passed(first).close()


def test_who_waits_no_more_is_told_so(lobby):
    with waiting_in(lobby, NAME) as listener:
        threading.Timer(0.2, listener.shutdown, [socket.SHUT_RDWR]).start()
        with pytest.raises(OSError, match="Invalid argument"):
            passed(listener)
