"""Commanding a federation: from the server's own folder, or from anywhere with the administrator's kit.

Both ways ask the same questions (`server/commands.py`). With a kit they travel through the server's one port,
in FLARE's administrator protocol.
"""

from __future__ import annotations

import base64
import contextlib
import io
import json
import logging
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from fedllm.core.errors import FedllmError
from fedllm.federation.keep import needs_flare
from fedllm.federation.members import of
from fedllm.federation.server import commands
from fedllm.runtime.line import Head

Ask: TypeAlias = Callable[[Head], dict[str, Any]]
"""From a question to its answer; raises `FedllmError` with the server's own sentence."""

TIMEOUT, LOGIN = 15.0, 15.0

STARTS = 20.0
"""Seconds in which a server that was just started opens its port."""

ANSWER = 45.0
"""Seconds after which a question that gets no answer is given up."""


@contextmanager
def opened(place: Path) -> Iterator[Ask]:
    """Yield a way to ask: `place` is a federation's folder, or an administrator's kit."""
    if (place / "consortium.toml").exists():
        folder, user = place.absolute(), of(place).admin
        yield lambda head: checked(commands.answer(folder, user, head))
    elif (place / "startup" / "fed_admin.json").exists():
        with session(place.absolute()) as ask:
            yield ask
    else:
        raise FedllmError(f"'{place}' is neither a federation's folder nor an administrator's kit.")


def submit(place: Path, name: str, recipe: str, patience: float = commands.PATIENCE) -> list[str]:
    """Start a run of a recipe (TOML); return the sites that it will ask."""
    with opened(place) as ask:
        return list(ask({"do": "submit", "name": name, "recipe": recipe, "patience": patience})["sites"])


def status(place: Path, name: str = "") -> dict[str, Any]:
    """Return what all runs, or one, are doing, and which sites are connected."""
    with opened(place) as ask:
        return ask({"do": "status", "name": name})


def logs(place: Path, name: str, lines: int = 100) -> list[str]:
    """Return the last lines of what the server wrote about a run."""
    with opened(place) as ask:
        return list(ask({"do": "logs", "name": name, "lines": lines})["lines"])


def stop(place: Path, name: str) -> None:
    """Stop a run, and the training at its sites."""
    with opened(place) as ask:
        ask({"do": "stop", "name": name})


def resume(place: Path, name: str) -> None:
    """Have a run go on that was stopped or has failed."""
    with opened(place) as ask:
        ask({"do": "resume", "name": name})


def fetch(place: Path, name: str, to: Path, tick: Callable[[int], None] = lambda size: None) -> Path:
    """Copy a run's folder to this machine; a file that is here whole already is not copied again."""
    with opened(place) as ask:
        for path, size in ask({"do": "files", "name": name})["files"].items():
            relative = Path(path)
            if relative.is_absolute() or ".." in relative.parts:
                raise FedllmError(f"The server names a file '{path}', which is no part of a run.")
            copy(ask, name, path, size, to / relative, tick)
    return to


def copy(ask: Ask, name: str, path: str, size: int, target: Path, tick: Callable[[int], None]) -> None:
    """Copy one file, unless it is here whole already; several may copy the same run at once."""
    if target.exists() and target.stat().st_size == size:
        return
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.{os.getpid()}.part")
    try:
        with beside.open("wb") as file:
            while True:
                data = base64.b64decode(ask({"do": "read", "name": name, "path": path, "offset": file.tell()})["data"])
                if not data:
                    break
                file.write(data)
                tick(len(data))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)


@contextmanager
def session(kit: Path) -> Iterator[Ask]:
    """Log in with the administrator's certificate, and out at the end.

    Raises:
        FedllmError: within a minute, if the server is not there, does not answer, or lets nobody in by this kit.
    """
    needs_flare()
    from nvflare.fuel.hci.client.api import AdminAPI

    from fedllm.federation import dial

    table = json.loads((kit / "startup" / "fed_admin.json").read_text(encoding="utf-8"))["admin"]
    dial.knock(table["host"], table["port"], kit / "startup", patience=STARTS)
    dial.install()
    own = {key: str(kit / "startup" / table[key]) for key in ("client_key", "client_cert", "ca_cert")}
    where = f"{table['host']}:{table['port']}"
    logging.getLogger("nvflare").setLevel(logging.CRITICAL)
    # FLARE prints what it does; what matters of it is raised.
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        api = AdminAPI(user_name=table["username"], admin_config=table | own, cmd_modules=[], auto_login_max_tries=1)
        try:
            api.connect(LOGIN)
            login = api.login()
        except Exception as error:  # FLARE raises bare exceptions of many kinds
            api.close()
            raise FedllmError(f"The server at {where} does not let '{table['username']}' in ({error}).") from error
    if not api.is_ready():
        api.close()
        raise FedllmError(f"The server at {where} does not let '{table['username']}' in ({login.get('details', '')}).")
    api.set_command_timeout(TIMEOUT)
    try:
        yield lambda head: checked(over(api, head, where))
    finally:
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            api.logout()


def over(api: Any, head: Head, where: str) -> dict[str, Any]:
    """Ask through the port; a question that is lost on the way is asked again, for `ANSWER` seconds."""
    begun, wait = time.monotonic(), 0.5
    while True:
        result = api.server_execute("fedllm", props=head)
        for item in result.get("data") or []:
            if isinstance(item, dict) and item.get("type") == "dict":
                return dict(item["data"])
        if time.monotonic() + wait - begun > ANSWER - TIMEOUT:
            break
        time.sleep(wait)
        wait *= 2
    reason = result.get("details") or result.get("status")
    raise FedllmError(f"The server at {where} does not answer ({reason}); what is at work there goes on.")


def checked(answer: dict[str, Any]) -> dict[str, Any]:
    """Return an answer that is not an error."""
    if "error" in answer:
        raise FedllmError(str(answer["error"]))
    return answer
