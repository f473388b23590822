"""Flower beside this project's engine: an empty round and 100 MB each way, four sites here, one after the other.

`python -m benchmarks.reference_flower --flower VENV/bin` needs an environment of its own with `pip install flwr`,
since Flower pins other versions of shared libraries. Flower's server, nodes and app run as its documentation says,
without TLS (which would only slow it down); ours with mutual TLS, as always. Both sides send back what they get.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import keep
from benchmarks.federation import engine
from benchmarks.sites import end, free_port

SITES = 4

APP = '''\
"""A server that sends arrays and nodes that send them back."""

import json
import time
from pathlib import Path

import numpy as np
from flwr.app import ArrayRecord, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import ServerApp

client = ClientApp()
server = ServerApp()


@client.query()
def echo(message, context):
    return Message(message.content, reply_to=message)


@server.main()
def main(grid, context):
    while len(nodes := list(grid.get_node_ids())) < SITES:
        time.sleep(0.2)

    def a_round(arrays):
        content = RecordDict({"arrays": ArrayRecord(arrays)} if arrays else {})
        begun = time.perf_counter()
        asked = [Message(content, dst_node_id=node, message_type="query") for node in nodes]
        replies = list(grid.send_and_receive(asked, timeout=900))
        seconds = time.perf_counter() - begun
        assert len(replies) == len(nodes) and not any(reply.has_error() for reply in replies)
        for reply in replies if arrays else []:
            back = reply.content["arrays"].to_numpy_ndarrays()
            assert all((one == other).all() for one, other in zip(arrays, back, strict=True))
        return seconds

    told = {"empty": [a_round([]) for _ in range(6)][1:]}
    arrays = [np.full(100 * 10**6 // 4 // 8, n, dtype=np.float32) for n in range(8)]
    told["100"] = [a_round(arrays) for _ in range(3)]
    path = Path(context.run_config["out"])
    path.with_suffix(".part").write_text(json.dumps(told))
    path.with_suffix(".part").rename(path)
'''

PROJECT = """\
[build-system]
requires = ["hatchling"]
build-backend = "hatchling.build"
[project]
name = "echo"
version = "1.0.0"
description = "Sends arrays back."
license = "Apache-2.0"
dependencies = ["flwr"]
[tool.hatch.build.targets.wheel]
packages = ["."]
[tool.flwr.app]
publisher = "nobody"
[tool.flwr.app.components]
serverapp = "echo.app:server"
clientapp = "echo.app:client"
[tool.flwr.app.config]
out = "{out}"
"""


def flower(programs: Path, place: Path, seconds: float) -> dict[str, float]:
    """Measure Flower, whose commands lie in `programs`."""
    app, home, port = place / "app", place / "home", free_port()
    (app / "echo").mkdir(parents=True)
    home.mkdir()
    (app / "pyproject.toml").write_text(PROJECT.format(out=place / "told.json"))
    (app / "echo" / "__init__.py").write_text("")
    (app / "echo" / "app.py").write_text(APP.replace("SITES", str(SITES)))
    (home / "config.toml").write_text(
        f'[superlink]\ndefault = "here"\n[superlink.here]\naddress = "127.0.0.1:{port}"\ninsecure = true\n'
    )
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"FLWR_HOME": str(home), "PATH": f"{programs}{os.pathsep}{env['PATH']}", "FLWR_TELEMETRY_ENABLED": "0"}
    with ExitStack() as stack, (place / "flower.log").open("ab") as log:

        def keeps(*command: str) -> None:
            path = str(programs / command[0])
            process = subprocess.Popen([path, *command[1:]], cwd=place, env=env, stdout=log, stderr=log)
            stack.callback(end, process)

        begun = time.time()
        keeps("flower-superlink", "--insecure", "--host", "127.0.0.1", "--port", str(port))
        for _ in range(SITES):
            address = ["--superlink", f"127.0.0.1:{port}", "--host", "127.0.0.1", "--port", str(free_port())]
            keeps("flower-supernode", "--insecure", *address)
        submitted = False
        while not (place / "told.json").exists():
            if time.time() - begun > seconds:
                print((place / "flower.log").read_text()[-4000:], file=sys.stderr)
                raise TimeoutError(f"Flower did not end within {seconds:g} s; the end of its log is above")
            # Refused until the server listens.
            run = [programs / "flwr", "run", app, "here"]
            submitted = submitted or not subprocess.run(run, env=env, stdout=log, stderr=log).returncode
            time.sleep(0.5)
    told = json.loads((place / "told.json").read_text())
    return {
        "empty_round_s": round(statistics.median(told["empty"]), 3),
        "mb_per_s_100": round(2 * SITES * 100 / statistics.median(told["100"]), 1),
    }


def main(
    programs: Annotated[Path, typer.Option("--flower", help="The folder of Flower's commands.")],
    seconds: Annotated[float, typer.Option(help="How long Flower may take.")] = 900.0,
    ours: Annotated[bool, typer.Option(help="Measure this project's engine too.")] = True,
) -> None:
    """Measure both and keep what came out."""
    if not (programs / "flower-superlink").exists():
        print(
            f"Flower is not in '{programs}': `python -m venv VENV && VENV/bin/pip install flwr`; nothing was measured."
        )
        sys.exit(0)
    version = subprocess.run([programs / "flwr", "--version"], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix="fedllm-flower-") as place:
        (Path(place) / "flower").mkdir()
        theirs = flower(programs.absolute(), Path(place) / "flower", seconds)
        found: dict[str, Any] = {
            "flower": version.split()[-1],
            **{f"flower_{key}": each for key, each in theirs.items()},
        }
        if ours:
            (Path(place) / "ours").mkdir()
            own = engine(Path(place) / "ours")
            found |= {key: own[key] for key in theirs}
    keep("reference_flower", found)


if __name__ == "__main__":
    typer.run(main)
