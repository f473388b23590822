"""FLARE for tests: a server and sites as processes on loopback, and a line to such sites from the tests' process."""

from __future__ import annotations

import json
import os
import queue
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from contextlib import closing, suppress
from multiprocessing.connection import Client
from pathlib import Path

from fedllm.federation import control, members
from fedllm.runtime.line import Aborted, Line, Unreachable, decode, encode
from tests.flare_parts import until

ROOT = Path(__file__).resolve().parents[1]
USER = "admin@example.org"


def free_port():
    with closing(socket.socket()) as found:
        found.bind(("127.0.0.1", 0))
        return found.getsockname()[1]


def daemon(log, *arguments):
    with log.open("ab") as out:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.flare_parts", *map(str, arguments)],
            stdout=out,
            stderr=out,
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT)},
        )


class Federation:
    """A server and sites that are daemons of their own, and what a test does with them."""

    def __init__(self, place, sites, what="site", server="server"):
        self.place, self.folder, self.port, self.what = place, place / "federation", free_port(), what
        (place / "consortium.toml").write_text(
            f'name = "demo"\nadmin = "{USER}"\nsites = {json.dumps(sites)}\n'
            f'[server]\naddress = "127.0.0.1"\nport = {self.port}\n'
        )
        members.init(place / "consortium.toml", self.folder)
        for site in sites:
            members.join(members.approve(self.folder, members.request(site, place / site)), place / site)
        self.begun = time.monotonic()
        self.daemons = {"server": daemon(place / "server.log", server, self.folder)}
        for site in sites:
            self.start(site)

    def start(self, site):
        self.daemons[site] = daemon(self.place / f"{site}.log", self.what, site, self.place / site)

    def submit(self, name, **recipe):
        text = "".join(f"{key} = {json.dumps(value)}\n" for key, value in recipe.items())
        control.submit(self.folder, name, text)

    def state(self, name):
        return control.status(self.folder, name)["runs"][name]

    def ends(self, name, seconds=60):
        return until(lambda: (s := self.state(name))["state"] in ("done", "failed", "stopped") and s, seconds)

    def attempts(self, name):
        path = self.folder / "runs" / name / "attempts.jsonl"
        return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []

    def log(self):
        return (self.folder / "server" / "log.txt").read_text()

    def close(self):
        for each in self.daemons.values():
            each.terminate()
        for each in self.daemons.values():
            each.wait(60)


class Engine:
    """A run of FLARE that passes calls on, for exchanges of the tests' own process with fake sites in theirs."""

    def __init__(self, place, names, server):
        self.federation, self.names = Federation(place, names, "fake", server), names
        self.sockets, self.free, self.runs = Path(tempfile.mkdtemp(prefix="fedllm-")), queue.LifoQueue(), 0
        self.line = Line(self.call, lambda: self.names)

    def ready(self, client, number):
        """See that there is a run at work, and give every site a desk of its own for this client."""
        if not self.runs or self.federation.state(f"run-{self.runs}")["state"] != "running":
            self.runs += 1
            self.path = str(self.sockets / str(self.runs))
            self.federation.submit(f"run-{self.runs}", do="bridge", socket=self.path)
            until(lambda: Path(self.path).exists(), 300)
        for name in self.names:
            said = {"do": "client", "module": client.__module__, "name": client.__name__, "number": number}
            until(lambda site=name, said=said: self.says(site, said), 60)

    def says(self, site, head):
        """Return what a site answers to what no desk would be asked, or None."""
        with suppress(Unreachable):
            return self.line.call(site, head, b"", 5.0)[0]

    def stop(self):
        """Stop the run as its user would."""
        control.stop(self.federation.folder, f"run-{self.runs}")

    def call(self, site, head, body, seconds):
        """What the line of the run's own process does, done from here."""
        try:
            try:
                connection = self.free.get_nowait()
            except queue.Empty:
                connection = Client(self.path, "AF_UNIX")
            connection.send_bytes(encode({"site": site, "seconds": seconds, "head": head}, body))
            told, content = decode(connection.recv_bytes())
        except (OSError, EOFError) as error:
            self.free = queue.LifoQueue()
            raise Aborted("the run's process is gone") from error
        self.free.put(connection)
        if "unreachable" in told:
            raise Unreachable(told["unreachable"])
        if "aborted" in told:
            raise Aborted(told["aborted"])
        return told["head"], content

    def close(self):
        self.federation.close()
        shutil.rmtree(self.sockets)
