"""The connections of a run with its sites: one each, used by one call at a time."""

from __future__ import annotations

import ssl
import threading
from typing import NamedTuple


class Connection(NamedTuple):
    """A connection with a site, and the serial number (hex) of the certificate that it showed."""

    socket: ssl.SSLSocket
    serial: str


class Connected:
    """Those connections; threads may share it. Closing it closes them, and one that is in a call ends with that."""

    def __init__(self) -> None:
        self._lock, self._over = threading.Lock(), False
        self._of: dict[str, Connection] = {}
        self._busy = set[Connection]()

    def __contains__(self, site: str) -> bool:
        return site in self._of

    def close(self) -> None:
        """Let go of all connections."""
        with self._lock:
            self._over = True
        for site in list(self._of):
            self.put(site, None)

    def put(self, site: str, connection: Connection | None) -> None:
        """Let a connection take the place of the one that a site has."""
        with self._lock:
            left = {self._of.pop(site, None), connection} - self._busy
            if connection and not self._over:
                self._of[site] = connection
                left.discard(connection)
        for each in left:
            if each:
                each.socket.close()

    def take(self, site: str) -> Connection | None:
        """Return a site's connection to be used alone, or None if there is none or another call uses it."""
        with self._lock:
            connection = self._of.get(site)
            if connection is None or connection in self._busy:
                return None
            self._busy.add(connection)
            return connection

    def give_back(self, site: str, connection: Connection, whole: bool) -> None:
        """Let other calls use a connection, unless it broke within a message or another one has taken its place."""
        with self._lock:
            self._busy.discard(connection)
            if self._of.get(site) is connection:
                if whole:
                    return
                del self._of[site]
        connection.socket.close()
