"""The way to the server's port: a connection comes about within a stated time, and a machine that died is noticed.

FLARE's own TCP driver shakes hands without a limit, so a server that is stuck, or a cable that is pulled just then,
would hold a site, or an administrator's command, for ever.
"""

from __future__ import annotations

import json
import socket
import ssl
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nvflare.apis.fl_component import FLComponent
from nvflare.fuel.f3.communicator import driver_mgr
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.driver_params import DriverParams
from nvflare.fuel.f3.drivers.net_utils import get_ssl_context
from nvflare.fuel.f3.drivers.socket_conn import SocketConnection
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver

from fedllm.core.errors import FedllmError

SECONDS = 10.0
"""Seconds in which a connection must come about, its handshake included."""

KEEPALIVE = {"TCP_KEEPIDLE": 30, "TCP_KEEPINTVL": 10, "TCP_KEEPCNT": 6}
"""A peer of whom nothing is heard for so many seconds is asked; after so many questions it is dead."""


class Dial(TcpDriver):
    """FLARE's TCP driver with these limits."""

    seconds = SECONDS

    def connect(self, connector: ConnectorInfo) -> None:
        """Connect, and read until the connection ends; raise `OSError` if it does not come about in time."""
        self.connector = connector
        host, port = (connector.params[each.value] for each in (DriverParams.HOST, DriverParams.PORT))
        context = get_ssl_context(connector.params, ssl_server=False)
        plain = socket.create_connection((host, int(port)), self.seconds)
        try:
            peer = context.wrap_socket(plain) if context else plain
        except BaseException:
            plain.close()
            raise
        peer.settimeout(None)
        keep_alive(peer)
        connection = SocketConnection(peer, connector, bool(context))
        self.add_connection(connection)
        connection.read_loop()
        self.close_connection(connection)


class Dialler(FLComponent):
    """The component by which a site's processes connect so; FLARE builds it before it connects."""

    def __init__(self) -> None:
        super().__init__()
        install()


def install() -> None:
    """Have this process connect with `Dial`; FLARE keeps the driver that it knows first."""
    driver_mgr.drivers.update(tcp=Dial, stcp=Dial)


def keep_alive(peer: socket.socket) -> None:
    """Have the system notice when the other end has died without a word."""
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for option, value in KEEPALIVE.items():
        if hasattr(socket, option):
            peer.setsockopt(socket.IPPROTO_TCP, getattr(socket, option), value)


def server_of(kit: Path) -> tuple[str, int]:
    """Return the server's address and port as a site's kit has them."""
    (server,) = json.loads((kit / "startup" / "fed_client.json").read_text(encoding="utf-8"))["servers"]
    host, port = server["service"]["target"].rsplit(":", 1)
    return host, int(port)


def dialled(kit: Path, name: str) -> ssl.SSLSocket:
    """Return a connection with the run that waits at the server's port under this name.

    Raises:
        FedllmError: if there is none, or something between takes the name out of the greeting.
    """
    host, port = server_of(kit)
    context = client_context(kit / "startup")
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    context.set_alpn_protocols([name])
    with saying(host, port, SECONDS):
        plain = socket.create_connection((host, port), SECONDS)
        try:
            peer = context.wrap_socket(plain, server_hostname=host)
        except BaseException:
            plain.close()
            raise
    if peer.selected_alpn_protocol() != name:
        peer.close()
        raise FedllmError(f"The port {host}:{port} does not lead to this run; see what TLS goes through on the way.")
    peer.settimeout(None)
    peer.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    keep_alive(peer)
    return peer


def client_context(startup: Path) -> ssl.SSLContext:
    """Return how a party shakes hands: with its own certificate, and with its federation's server alone."""
    context = ssl.create_default_context(cafile=startup / "rootCA.pem")
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    return context


@contextmanager
def saying(host: str, port: int, seconds: float) -> Iterator[None]:
    """Turn what goes wrong with a connection to the server into one sentence."""
    try:
        yield
        return
    except TimeoutError:
        reason = f"does not answer within {seconds:g} s; see that it is not stuck, and that nothing between stops TCP"
    except ssl.SSLCertVerificationError as error:
        reason = f"is not this federation's ({error.verify_message}); check the address and the kit"
    except ssl.SSLError as error:
        reason = f"speaks no TLS of this federation ({error.reason}); check the address"
    except OSError as error:
        reason = f"cannot be reached ({error.strerror or error}); see that `fedllm federation start` runs there"
    raise FedllmError(f"The server at {host}:{port} {reason}.")


def knock(
    host: str, port: int, startup: Path, seconds: float = SECONDS, verdict: float = 0.0, patience: float = 0.0
) -> None:
    """See that there is a server of this federation at the other end; `startup` has the certificates of a kit.

    In TLS 1.3 a peer learns only after its handshake that it is refused: that is waited for `verdict` seconds. A
    server that is about to start has no port yet: it is tried again for `patience` seconds.

    Raises:
        FedllmError: if there is none, within `seconds` after that.
    """
    wait_for_port(host, port, seconds, time.monotonic() + patience)
    with (
        saying(host, port, seconds),
        socket.create_connection((host, port), seconds) as plain,
        client_context(startup).wrap_socket(plain, server_hostname=host) as peer,
    ):
        if not verdict or not refused(peer, verdict):
            return
    raise FedllmError(
        f"The server at {host}:{port} refuses this certificate, which has expired or was revoked; send a new request."
    )


def wait_for_port(host: str, port: int, seconds: float, until: float) -> None:
    """Wait while nobody listens at a port, no longer than `until`."""
    while time.monotonic() < until:
        try:
            socket.create_connection((host, port), seconds).close()
        except ConnectionRefusedError:
            time.sleep(0.5)
        except OSError:
            return
        else:
            return


def refused(peer: ssl.SSLSocket, seconds: float) -> bool:
    """Tell whether the other end cuts the connection within so many seconds."""
    peer.settimeout(seconds)
    try:
        return peer.recv(1) == b""
    except TimeoutError:
        return False
    except OSError:
        return True
