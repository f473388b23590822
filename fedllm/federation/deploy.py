"""Files that keep a server or a site running: a systemd unit, a Compose file, or a Helm chart."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fedllm.core.errors import FedllmError, nearest
from fedllm.federation.fill import fill

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,62}")
NOBODY = 10001
"""The user of a container whose files belong to root: a container never runs as root."""


class Daemon(NamedTuple):
    """What is kept running."""

    role: Literal["server", "site"]
    name: str
    path: Path
    """The federation's folder, or the site's `site.toml`."""
    state: Path
    """The folder that it writes to, with its heartbeat; for a server the federation's folder or one in it."""
    port: int = 0
    """The server's one port; a site has none."""
    writes: Sequence[Path] = ()
    """Other folders that it writes to."""
    reads: Sequence[Path] = ()
    """Files and folders that it reads and that lie outside its own folder: data and models."""


def deploy(daemon: Daemon, kind: str, out: Path) -> list[Path]:
    """Write the files of one kind of deployment (`systemd`, `compose` or `helm`) and return their paths.

    A file that is there already and differs is an error, since it may have been edited.
    """
    if kind not in KINDS:
        raise FedllmError(f"The kind of deployment {kind!r} is not known; {nearest(kind, KINDS)}")
    _check(daemon)
    texts = {out / name: text for name, text in KINDS[kind](_resolved(daemon)).items()}
    for path, text in texts.items():
        if path.exists() and path.read_text(encoding="utf-8") != text:
            raise FedllmError(f"{path} is there already and differs; move it away or name another folder.")
    for path, text in texts.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    return list(texts)


def systemd(daemon: Daemon) -> dict[str, str]:
    """Return the hardened unit of a daemon: file name -> text."""
    beside = Path(sys.executable).with_name("fedllm")
    program = [str(beside)] if beside.exists() else [sys.executable, "-m", "fedllm"]
    unit = f"fedllm-{daemon.role}-{daemon.name}.service"
    hidden = any(path.is_relative_to(top) for path in _touched(daemon) for top in ("/tmp", "/var/tmp"))
    facts = _facts(daemon, daemon.path) | {"unit": unit, "user": _owner(daemon.path), "private_tmp": not hidden}
    facts["command"] = [*program, *facts["start"]]
    return {unit: fill("systemd.service.j2", facts)}


def compose(daemon: Daemon) -> dict[str, str]:
    """Return a Compose file and what its image is built from; paths are the same inside as outside."""
    found = daemon.path.stat()
    writes = {daemon.state, *daemon.writes}
    user = f"{found.st_uid}:{found.st_gid}" if found.st_uid else f"{NOBODY}:{NOBODY}"
    facts = _facts(daemon, daemon.path) | {
        "user": user,
        "rooted": found.st_uid == 0,
        "mounts": {str(path): path in writes for path in _touched(daemon)},
    }
    return {"compose.yaml": fill("compose.yaml.j2", facts)} | _image(facts)


def helm(daemon: Daemon) -> dict[str, str]:
    """Return a Helm chart and what its image is built from; the daemon's folder is on a volume that outlives it."""
    server = daemon.role == "server"
    facts = _facts(daemon, Path("/federation") if server else Path("/site", daemon.path.name))
    facts |= {"home": "/federation" if server else "/site", "folder": str(_home(daemon))}
    names = [name for name in CHART if server or name != "templates/service.yaml"]
    chart = {f"fedllm-{daemon.role}/{name}": fill(f"helm/{Path(name).name}.j2", facts) for name in names}
    return chart | _image(facts)


CHART = (
    "Chart.yaml",
    "values.yaml",
    "templates/statefulset.yaml",
    "templates/networkpolicy.yaml",
    "templates/service.yaml",
    "templates/NOTES.txt",
)

KINDS: Mapping[str, Callable[[Daemon], dict[str, str]]] = {"systemd": systemd, "compose": compose, "helm": helm}


def _facts(daemon: Daemon, path: Path) -> dict[str, Any]:
    word = "federation" if daemon.role == "server" else "site"
    return {
        "daemon": daemon,
        "nobody": NOBODY,
        "start": [word, "start", str(path)],
        "health": ["fedllm", word, "health", str(path)],
    }


def _image(facts: Mapping[str, Any]) -> dict[str, str]:
    return {"Dockerfile": fill("Dockerfile.j2", facts), ".dockerignore": "*\n!*.whl\n"}


def _home(daemon: Daemon) -> Path:
    return daemon.path if daemon.role == "server" else daemon.path.parent


def _touched(daemon: Daemon) -> list[Path]:
    """Return what it reads or writes, a folder before what is inside it."""
    return sorted({_home(daemon), daemon.state, *daemon.writes, *daemon.reads})


def _check(daemon: Daemon) -> None:
    if not NAME.fullmatch(daemon.name):
        raise FedllmError(f"The name {daemon.name!r} cannot name a service; use letters, digits, '.', '_' and '-'.")
    if daemon.role == "server" and not 0 < daemon.port < 2**16:
        raise FedllmError(f"The server's port is {daemon.port}; give one from 1 to 65535.")
    for path in (daemon.path, daemon.state, *daemon.writes, *daemon.reads):
        if not path.exists():
            raise FedllmError(f"{path} does not exist; make it before the files that keep the {daemon.role} running.")
        if not str(path.absolute()).isprintable():
            raise FedllmError(f"{str(path)!r} has an unprintable character in it; rename it.")


def _resolved(daemon: Daemon) -> Daemon:
    found = daemon._replace(path=daemon.path.resolve(), state=daemon.state.resolve())
    outside = {path.resolve() for path in daemon.reads if not path.resolve().is_relative_to(_home(found))}
    return found._replace(writes=[path.resolve() for path in daemon.writes], reads=sorted(outside))


def _owner(path: Path) -> str:
    try:
        return path.owner()
    except KeyError:  # a user without a name, as in a container
        return str(path.stat().st_uid)
