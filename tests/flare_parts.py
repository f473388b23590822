"""Small stand-ins for a federation's two ends: a run's loop that does what its recipe says, and a site that echoes.

Run as `python -m tests.flare_parts server FOLDER` or `... site NAME FOLDER`.
"""

import json
import os
import sys
import time
import tomllib
from pathlib import Path

from fedllm.core.errors import FedllmError
from fedllm.runtime.line import decode, encode


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
    rounds = 0
    while recipe["do"] == "hold" and not (folder / "go").exists():
        rounds += 1
        (folder / "live.json").write_text(json.dumps({"state": "running", "round": rounds}))
        for site in line.sites():
            line.call(site, {"do": "ping"}, b"", 5.0)
        time.sleep(0.2)


def site(name, folder):
    """Answer as a site that trains nothing; what it was told to stop is in `stopped.json`."""
    from fedllm.federation.site_daemon import start

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
    if sys.argv[1] == "server":
        from fedllm.federation.serve import serve

        serve(Path(sys.argv[2]), "tests.flare_parts:lead")
    else:
        site(sys.argv[2], Path(sys.argv[3]))
