"""What an administrator may ask of a federation, on the server's own disk or through its port.

A run is a folder under `runs/`. `run.json` is what the user wants of it, `engine.json` what the server
does about it, `live.json` what the run's loop says of itself; each has one writer.
"""

from __future__ import annotations

import base64
import os
import re
import shutil
import tomllib
from contextlib import suppress
from pathlib import Path
from typing import Any

from filelock import FileLock

from fedllm.core.errors import FedllmError
from fedllm.federation import notes
from fedllm.federation.members import of, revoked
from fedllm.runtime.line import Head

RUN = r"^[A-Za-z0-9][A-Za-z0-9_.-]{0,63}$"
LARGEST_RECIPE = 500_000
CHUNK = 2 << 20
"""Bytes of a file that one answer carries at most."""

PATIENCE = 60
"""Seconds that a run waits for sites that are not connected, before it starts without them."""

PRIVATE = {"lock", "attempt.lock", "run.lock"}
"""Files of a run that are of no use elsewhere."""


def answer(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """Do what a user asks; what is wrong with it is `{"error": sentence}`."""
    asks = {
        "submit": submit,
        "status": status,
        "logs": logs,
        "stop": stop,
        "resume": resume,
        "files": files,
        "read": read,
    }
    try:
        do = asks.get(str(head.get("do")))
        if do is None:
            raise FedllmError(f"'{head.get('do')}' is nothing that this server can do.")
        return do(folder, user, head)
    except FedllmError as error:
        return {"error": str(error)}
    except OSError as error:
        return {"error": f"The server's disk does not do that ({error.strerror or error})."}


def submit(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """Make a run of a recipe's text; it starts when its sites are connected."""
    name, recipe = run_name(head), head.get("recipe")
    if not isinstance(recipe, str) or len(recipe) > LARGEST_RECIPE:
        raise FedllmError(f"A recipe is text of at most {LARGEST_RECIPE} characters.")
    try:
        tomllib.loads(recipe)
    except tomllib.TOMLDecodeError as error:
        raise FedllmError(f"The recipe is not TOML: {error}.") from error
    refused = revoked(folder)["names"]
    wish = {
        "wanted": "run",
        "asked": 1,
        "user": user,
        "sites": [site for site in of(folder).sites if site not in refused],
        "patience": number(head, "patience", PATIENCE),
    }
    made, target = folder / "runs" / f".{name}.{os.getpid()}", folder / "runs" / name
    made.mkdir()
    try:
        notes.put_text(made / "recipe.toml", recipe)
        notes.put(made / "run.json", wish)
        # A folder with files in it is never replaced, so the second of two is told.
        made.rename(target)
    except OSError:
        raise FedllmError(f"There is a run '{name}' already; resume it, or choose another name with --name.") from None
    finally:
        if made.exists():
            for file in made.iterdir():
                file.unlink()
            made.rmdir()
    return {"name": name, "sites": wish["sites"]}


def status(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """Tell of one run, or of all, and which sites are connected."""
    names = [run_name(head)] if head.get("name") else run_names(folder)
    runs = {name: told(run_folder(folder, name)) for name in names}
    refused = revoked(folder)["names"]
    connected = notes.get(folder / "connected.json").get("sites", [])
    sites = {site: {"connected": site in connected, "revoked": site in refused} for site in of(folder).sites}
    return {"runs": runs, "sites": sites, "free": shutil.disk_usage(folder).free}


def told(folder: Path) -> dict[str, Any]:
    """Return what the three files of a run say."""
    wish, engine = notes.get(folder / "run.json"), notes.get(folder / "engine.json")
    # Until the server has seen a wish, what it said is about the one before.
    seen = engine if engine.get("asked") == wish.get("asked") else {}
    return {
        "wanted": wish.get("wanted"),
        "user": wish.get("user"),
        "state": seen.get("state", "waiting"),
        "reason": seen.get("reason", ""),
        "attempt": engine.get("attempt", 0),
        "live": notes.get(folder / "live.json"),
    }


def logs(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """Return the last lines of what the server wrote about a run."""
    path, lines = run_folder(folder, run_name(head)) / "server.log", min(number(head, "lines", 100), 2000)
    with suppress(FileNotFoundError), path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - 200 * lines))
        return {"lines": file.read().decode(errors="replace").splitlines()[-lines:]}
    return {"lines": []}


def stop(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """Have a run stopped, also the training at its sites."""
    return wish(run_folder(folder, run_name(head)), "stop", user)


def resume(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """Have a run go on that was stopped or has failed."""
    return wish(run_folder(folder, run_name(head)), "run", user)


def wish(run: Path, wanted: str, user: str) -> dict[str, Any]:
    """Write down what is wanted of a run, tell its state before; `asked` counts, so that a wish said again is seen."""
    before = told(run)["state"]
    with FileLock(run / "run.lock"):
        table = notes.get(run / "run.json")
        table |= {"wanted": wanted, "asked": int(table.get("asked", 0)) + 1, "user": user}
        notes.put(run / "run.json", table)
    return {"name": run.name, "wanted": wanted, "state": before}


def files(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """List a run's files with their sizes; half-written ones and locks are left out."""
    run = run_folder(folder, run_name(head))
    found = (path for path in sorted(run.rglob("*")) if path.is_file() and not path.is_symlink())
    listed = {str(path.relative_to(run)): path.stat().st_size for path in found if not hidden(path.relative_to(run))}
    return {"files": listed}


def read(folder: Path, user: str, head: Head) -> dict[str, Any]:
    """Return a part of a run's file as base64."""
    run, path = run_folder(folder, run_name(head)), Path(str(head.get("path", "")))
    offset = number(head, "offset", 0)
    whole = run / path
    if path.is_absolute() or ".." in path.parts or hidden(path) or not whole.is_file() or whole.is_symlink():
        raise FedllmError(f"The run '{run.name}' has no file '{path}'.")
    with whole.open("rb") as file:
        file.seek(offset)
        return {"data": base64.b64encode(file.read(CHUNK)).decode(), "size": whole.stat().st_size}


def hidden(path: Path) -> bool:
    """Tell whether a path is nobody's business."""
    return any(part.startswith(".") for part in path.parts) or path.name in PRIVATE


def number(head: Head, key: str, usual: int) -> int:
    """Return a whole number of a head that is not negative."""
    value = head.get(key, usual)
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value < 2**53:
        raise FedllmError(f"'{key}' is {value!r}; give a number.")
    return int(value)


def run_name(head: Head) -> str:
    """Return the name of the run that a head is about; it becomes a file name."""
    name = head.get("name")
    if not isinstance(name, str) or not re.fullmatch(RUN, name):
        raise FedllmError(f"{name!r} is no name for a run; use letters, digits, '.', '-' and '_', 64 at most.")
    return name


def run_folder(folder: Path, name: str) -> Path:
    """Return a run's folder, which must be there."""
    if not (folder / "runs" / name / "run.json").is_file():
        raise FedllmError(f"There is no run '{name}'; `fedllm federation status` lists them.")
    return folder / "runs" / name


def run_names(folder: Path) -> list[str]:
    """Return the names of all runs."""
    return sorted(path.parent.name for path in (folder / "runs").glob("[!.]*/run.json"))
