"""The server's port: TLS 1.3 and nothing less, certificates looked up among the revoked, no peer in another's way.

FLARE's own TCP driver would take TLS 1.2, know of no revocation, and shake hands in the thread that
accepts, so that one silent peer holds up all others. What comes after the handshake is FLARE's, but for connections
that ask for a run's process: they go there.
"""

from __future__ import annotations

import logging
import os
import socket
import ssl
import threading
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

from nvflare.fuel.f3.communicator import driver_mgr
from nvflare.fuel.f3.drivers.connector_info import ConnectorInfo
from nvflare.fuel.f3.drivers.tcp_driver import TcpDriver, TcpStreamServer

from fedllm.federation.members import revoked
from fedllm.federation.server.lobby import LOBBY, passed_on
from fedllm.runtime.flare import FOLDER

HANDSHAKE = 10.0
"""Seconds that a peer has to show who it is."""

log = logging.getLogger("fedllm.tls")


class Port(TcpStreamServer):
    """Listens, and gives every peer a thread to prove itself in."""

    open: dict[Any, str]

    def __init__(self, driver: TcpDriver, connector: ConnectorInfo) -> None:
        super().__init__(driver, connector)
        self.open = {}
        if self.ssl_context:
            self.ssl_context.minimum_version = ssl.TLSVersion.TLSv1_3
            self.socket.do_handshake_on_connect = False
            ports.append(self)

    def finish_request(self, request: Any, client_address: Any) -> None:
        """Shake hands, look the certificate up, and hand the connection to FLARE."""
        if not self.ssl_context:
            super().finish_request(request, client_address)
            return
        try:
            request.settimeout(HANDSHAKE)
            folder = Path(os.environ[FOLDER])
            if passed_on(request, Path(os.environ[LOBBY]), folder / "server" / "startup", HANDSHAKE):
                return
            _, serial = proven(request, folder)
        except (OSError, ValueError) as error:
            log.warning("refused %s: %s", client_address[0], error)
            return
        request.settimeout(None)
        with lock:
            self.open[request] = serial
        try:
            super().finish_request(request, client_address)
        finally:
            with lock:
                self.open.pop(request, None)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Log what a connection ended with; the port stays open."""
        log.warning("the connection from %s ended", client_address[0], exc_info=True)


class Tls(TcpDriver):
    """FLARE's TCP driver behind this port."""

    def listen(self, connector: ConnectorInfo) -> None:
        """Serve until FLARE shuts down."""
        self.connector = connector
        self.server = Port(self, connector)
        self.server.serve_forever()


def proven(peer: ssl.SSLSocket, federation: Path) -> tuple[str, str]:
    """Shake hands with a peer; return the name and the serial number (hex) of its certificate.

    Raises:
        OSError, ValueError: if it does not prove that it is of this federation, or its certificate was revoked.
    """
    peer.do_handshake()
    certificate: dict[str, Any] = peer.getpeercert() or {}
    serial = f"{int(certificate['serialNumber'], 16):x}"
    if serial in revoked(federation)["serials"]:
        raise ssl.SSLError(f"the certificate {serial} of {certificate.get('subject')} was revoked")
    peer.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    return next((value for ((key, value),) in certificate["subject"] if key == "commonName"), ""), serial


ports: list[Port] = []
lock = threading.Lock()


def install() -> None:
    """Have this process listen with `Tls`; FLARE keeps the driver that it knows first."""
    driver_mgr.drivers.update(tcp=Tls, stcp=Tls)


def drop(serials: Collection[str]) -> None:
    """Cut the connections whose certificates were revoked since."""
    with lock:
        cut = [request for port in ports for request, serial in port.open.items() if serial in serials]
    for request in cut:
        log.warning("cut a connection whose certificate was revoked")
        with suppress(OSError):
            request.shutdown(socket.SHUT_RDWR)
