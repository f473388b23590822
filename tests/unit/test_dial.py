"""The way to the server's port: what is not there, silent, or another's is said within the stated time."""

from __future__ import annotations

import socket
import ssl
import threading
import time
from contextlib import contextmanager, suppress

import pytest

pytest.importorskip("nvflare", reason="the engine is not installed: pip install 'fedllm[federation]'")

from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo, Mode

from fedllm.core.errors import FedllmError
from fedllm.federation import control, members
from fedllm.federation.dial import Dial, knock


@contextmanager
def port(answers=lambda peer: time.sleep(5)):
    """A port that takes one peer after the other; by default it says nothing."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve():
            while True:
                try:
                    peer, _ = listener.accept()
                except OSError:
                    return
                threading.Thread(target=answers, args=(peer,), daemon=True).start()

        threading.Thread(target=serve, daemon=True).start()
        yield listener.getsockname()[1]


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    place = tmp_path_factory.mktemp("federation")
    (place / "c.toml").write_text(
        'name = "demo"\nadmin = "admin@example.org"\nsites = ["a"]\n[server]\naddress = "127.0.0.1"\nport = 1\n'
    )
    members.init(place / "c.toml", place / "one")
    members.init(place / "c.toml", place / "other")
    return place


def speaking(folder):
    """Answer a peer as the server of this federation does."""
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=folder / "ca" / "root.crt")
    startup = folder / "server" / "startup"
    context.load_cert_chain(startup / "server.crt", startup / "server.key")

    def speak(peer):
        # Who does not trust this server hangs up.
        with suppress(OSError):
            context.wrap_socket(peer, server_side=True).recv(1)

    return speak


def test_a_server_of_this_federation_is_found_and_anothers_is_not(federation):
    startup = federation / "one" / "admin" / "startup"
    with port(speaking(federation / "one")) as at:
        knock("127.0.0.1", at, startup, 5)
    with port(speaking(federation / "other")) as at, pytest.raises(FedllmError, match="not this federation's"):
        knock("127.0.0.1", at, startup, 5)
    with port(lambda peer: peer.sendall(b"HTTP/1.1 400 no\r\n\r\n")) as at, pytest.raises(FedllmError, match="no TLS"):
        knock("127.0.0.1", at, startup, 5)


def test_a_server_that_is_about_to_start_is_waited_for(federation):
    startup = federation / "one" / "admin" / "startup"
    with socket.create_server(("127.0.0.1", 0)) as free:
        at = free.getsockname()[1]
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH, cafile=federation / "one" / "ca" / "root.crt")
    own = federation / "one" / "server" / "startup"
    context.load_cert_chain(own / "server.crt", own / "server.key")

    def start():
        time.sleep(1)
        with socket.create_server(("127.0.0.1", at)) as listener:
            for _ in range(2):
                with suppress(OSError):
                    context.wrap_socket(listener.accept()[0], server_side=True).recv(1)

    server = threading.Thread(target=start, daemon=True)
    server.start()
    knock("127.0.0.1", at, startup, 5, patience=10)
    server.join(5)


def test_a_server_that_is_not_there_or_says_nothing_is_given_up_in_time(federation):
    startup = federation / "one" / "admin" / "startup"
    with pytest.raises(FedllmError, match=r"cannot be reached \(Connection refused\)"):
        knock("127.0.0.1", 1, startup, 5)
    begun = time.monotonic()
    with port() as at, pytest.raises(FedllmError, match=r"does not answer within 0\.5 s"):
        knock("127.0.0.1", at, startup, 0.5)
    assert time.monotonic() - begun < 4


def test_an_administrators_command_says_that_the_server_is_not_there(federation, monkeypatch):
    monkeypatch.setattr(control, "STARTS", 0.6)
    with pytest.raises(FedllmError, match="cannot be reached"), control.opened(federation / "one" / "admin"):
        pass


def test_the_engines_own_connection_does_not_wait_for_ever(federation):
    startup, dial = federation / "one" / "admin" / "startup", Dial()
    dial.seconds = 0.5
    with port() as at:
        params = {
            "scheme": "stcp",
            "host": "127.0.0.1",
            "port": at,
            "secure": True,
            "ca_cert": str(startup / "rootCA.pem"),
            "client_cert": str(startup / "client.crt"),
            "client_key": str(startup / "client.key"),
        }
        begun = time.monotonic()
        with pytest.raises(TimeoutError):
            dial.connect(ConnectorInfo("it", dial, params, Mode.ACTIVE, 0, 0, False, threading.Event()))
    assert time.monotonic() - begun < 4


def test_a_certificate_that_the_server_refuses_is_said(federation):
    startup = federation / "one" / "admin" / "startup"

    def refuses(peer):
        time.sleep(0.2)
        peer.close()

    speak = speaking(federation / "one")
    with port(lambda peer: (speak(peer), refuses(peer))) as at:
        knock("127.0.0.1", at, startup, 5, verdict=0.1)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    own = federation / "one" / "server" / "startup"
    context.load_cert_chain(own / "server.crt", own / "server.key")
    hangs_up = lambda peer: context.wrap_socket(peer, server_side=True).close()  # noqa: E731
    with port(hangs_up) as at, pytest.raises(FedllmError, match="refuses this certificate"):
        knock("127.0.0.1", at, startup, 5, verdict=2)
