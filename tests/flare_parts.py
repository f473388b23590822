"""Stand-ins for a federation's two ends: a run's loop that does what its recipe says, and sites that echo or work.

Run as `python -m tests.flare_parts server FOLDER`, `... site NAME FOLDER` or `... fake NAME FOLDER`; `alone FOLDER` is
a server that calls its sites by the engine alone, as where a network lets no second connection through.
"""

import importlib
import json
import os
import sys
import threading
import time
import tomllib
from contextlib import suppress
from multiprocessing.connection import Listener
from pathlib import Path

from fedllm.core.errors import FedllmError
from fedllm.runtime.line import Aborted, Unreachable, decode, encode


def lead(folder, line, expected):
    """Do what the recipe says; `attempts.jsonl` has a line for every time that this was called."""
    with (folder / "attempts.jsonl").open("a") as file:
        file.write(json.dumps({"pid": os.getpid(), "sites": sorted(line.sites()), "expected": list(expected)}) + "\n")
    recipe = tomllib.loads((folder / "recipe.toml").read_text())
    if recipe["do"] == "mend":
        raise FedllmError("The disk is full; make room.")
    if recipe["do"] == "crash":
        raise RuntimeError("a bug")
    if recipe["do"] == "echo":
        body, seconds = bytes.fromhex(recipe["hex"]), []
        for site in list(line.sites()) * 20:
            begun = time.perf_counter()
            head, back = line.call(site, {"do": "echo"}, body, 5.0)
            seconds.append(time.perf_counter() - begun)
            assert back == body and head["site"] == site
        (folder / "echo.json").write_text(json.dumps(seconds))
    if recipe["do"] == "bridge":
        bridge(recipe["socket"], line)
    rounds = 0
    while recipe["do"] == "hold" and not (folder / "go").exists():
        rounds += 1
        (folder / "live.json").write_text(json.dumps({"state": "running", "round": rounds}))
        for site in line.sites():
            line.call(site, {"do": "ping"}, b"", 5.0)
        time.sleep(0.2)


def bridge(path, line):
    """Do the calls that others ask for over a socket, until the run ends."""

    def converse(connection):
        with connection, suppress(OSError, EOFError):
            while True:
                asked, body = decode(connection.recv_bytes())
                try:
                    head, content = line.call(asked["site"], asked["head"], body, asked["seconds"])
                    connection.send_bytes(encode({"head": head}, content))
                except Unreachable as error:
                    connection.send_bytes(encode({"unreachable": str(error)}))
                except Aborted as error:
                    connection.send_bytes(encode({"aborted": str(error)}))

    def accept():
        while True:
            threading.Thread(target=converse, args=(listener.accept(),), daemon=True).start()

    listener = Listener(path, "AF_UNIX", backlog=64)
    threading.Thread(target=accept, daemon=True).start()
    while True:
        # Raises when the run is stopped.
        with suppress(Unreachable):
            line.call(line.sites()[0], {"do": "ping"}, b"", 5.0)
        time.sleep(0.2)


def fake(name, folder):
    """Answer as the fake site of `tests.fake_site` does, with the client that it is told."""
    from fedllm.federation.site.daemon import start
    from tests.fake_site import FakeSite

    desk, hush = None, 0.0

    def answer(data):
        nonlocal desk, hush
        head, _ = decode(data)
        if head["do"] == "client":
            client = getattr(importlib.import_module(head["module"]), head["name"])
            desk = FakeSite(name, client, folder / "fake" / str(head["number"]))
        elif head["do"] == "hush":
            hush = time.monotonic() + head["seconds"]
        elif head["do"] == "ran":
            return encode({"ran": desk.ran})
        elif head["do"] not in ("ping", "stop"):
            while time.monotonic() < hush:
                time.sleep(0.1)
            return desk.answer(data)
        return encode({"site": name})

    start(name, folder / "kit", folder / "state", answer)


def site(name, folder):
    """Answer as a site that trains nothing; what it was told to stop is in `stopped.json`."""
    from fedllm.federation.site.daemon import start

    def answer(data):
        head, body = decode(data)
        if head["do"] == "stop":
            (folder / "stopped.json").write_text(json.dumps(head))
        return encode({"site": name, "pid": os.getpid()}, body)

    start(name, folder / "kit", folder / "state", answer)


def lives(pid):
    """Tell whether there is such a process, and it is more than its entry in the table."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def until(true, seconds, every=0.1):
    """Wait until something is true, and return it."""
    end = time.monotonic() + seconds
    while not (found := true()):
        assert time.monotonic() < end, f"not within {seconds} s"
        time.sleep(every)
    return found


def processes(*words):
    """Return the ids of processes that have all of these words in their command."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            command = path.read_bytes().decode(errors="replace").split("\0")
        except OSError:
            continue
        if all(any(word in part for part in command) for word in words) and "leash" not in "".join(command):
            found.append(int(path.parent.name))
    return found


if __name__ == "__main__":
    if sys.argv[1] in ("server", "alone"):
        from fedllm.federation.server import serve

        if sys.argv[1] == "alone":
            serve.DIRECT = "tests.flare_parts:lead"
        serve.serve(Path(sys.argv[2]), "tests.flare_parts:lead")
    else:
        {"site": site, "fake": fake}[sys.argv[1]](sys.argv[2], Path(sys.argv[3]))
