"""A federation's keys and certificates, and a port that knows only how to pass connections on."""

import socket
import ssl
import threading
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import NamedTuple

from fedllm.federation import kits, members
from fedllm.federation.server.lobby import passed_on, server_context


class Made(NamedTuple):
    """A federation's folder, its server's certificates, and the folders of its sites by name."""

    folder: Path
    startup: Path
    sites: dict[str, Path]


def made(place, sites, port=1):
    """Make a federation whose server has this port, and have these sites join it."""
    (place / "c.toml").write_text(
        f'name = "demo"\nadmin = "admin@example.org"\nsites = {sites}\n'
        f'[server]\naddress = "127.0.0.1"\nport = {port}\n'.replace("'", '"')
    )
    folder = place / "federation"
    members.init(place / "c.toml", folder)
    for site in sites:
        members.join(members.approve(folder, members.request(site, place / site)), place / site)
    return Made(folder, folder / "server" / "startup", {site: place / site for site in sites})


def client_context(federation, names, kit=None):
    """How a site, or the administrator, shakes hands and asks for these protocols."""
    startup = (kit or federation.folder / "admin") / "startup"
    context = ssl.create_default_context(cafile=startup / "rootCA.pem")
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    if names:
        context.set_alpn_protocols(names)
    return context


@contextmanager
def port(federation, lobby):
    """A port that passes on whom it can and hangs up on all others; the sites' kits are told where it is."""
    context = server_context(federation.startup)

    def serve(plain):
        plain.settimeout(3)
        peer = context.wrap_socket(plain, server_side=True, do_handshake_on_connect=False)
        with peer, suppress(OSError):
            passed_on(peer, lobby, federation.startup, 3)

    def accept(listener):
        while True:
            try:
                plain, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(plain,), daemon=True).start()

    with socket.create_server(("127.0.0.1", 0)) as listener:
        for name, place in federation.sites.items():
            kits.site_kit(place / "kit", name, "demo", "127.0.0.1", listener.getsockname()[1])
        threading.Thread(target=accept, args=(listener,), daemon=True).start()
        try:
            yield listener.getsockname()[1]
        finally:
            listener.shutdown(socket.SHUT_RDWR)
