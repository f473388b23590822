"""A federation on this machine by its commands: a server and sites as processes on loopback, each in its own world."""

from __future__ import annotations

import os
import subprocess
import time
from contextlib import contextmanager

from benchmarks.sites import FEDLLM, join_all
from fedllm.app.config import read_recipe, write_recipe
from fedllm.federation.server.commands import answer
from tests.integration.test_two_machines import SITES

USER = "admin@example.org"


class Loopback:
    """A federation of SITES, whose daemons are started and stopped by name; `world` is added to a daemon's environment.

    The text of a site and the base model of all are what `prepare` made in `place`.
    """

    def __init__(self, place, world=None, models=None):
        self.place, self.world, self.running = place, world or {}, {}
        self.folder = join_all(place, SITES)
        for name in SITES:
            path = place / name / "site.toml"
            model = (models or {}).get(name, "{}")
            path.write_text(path.read_text().replace("[models]\n", f'[models]\n"{place / "model"}" = {model}\n'))

    def start(self, *names):
        for name in names or ["server", *SITES]:
            command = ["federation", "start", str(self.folder)]
            if name != "server":
                command = ["site", "start", str(self.place / name / "site.toml")]
                command += ["--data", str(self.place / f"{name}.jsonl")]
            with (self.place / f"{name}.log").open("ab") as log:
                env = {**os.environ, **self.world.get(name, {})}
                # Not from here, since a module of the folder that a process is in goes before any other.
                process = subprocess.Popen([*FEDLLM, *command], stdout=log, stderr=log, env=env, cwd=self.place)
                self.running[name] = process

    def stop(self, *names):
        for name in names or list(self.running):
            process = self.running.pop(name)
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def ask(self, **head):
        told = answer(self.folder, USER, head)
        assert "error" not in told, told
        return told

    def submit(self, name, *settings, **more):
        recipe = write_recipe(read_recipe(self.place / "recipe.toml", list(settings)))
        return self.ask(do="submit", name=name, recipe=recipe, **more)

    def state(self, name):
        return self.ask(do="status", name=name)["runs"][name]

    def until(self, name, true, seconds=600):
        """Wait until something is true of a run's state."""
        end = time.monotonic() + seconds
        while not true(state := self.state(name)):
            assert time.monotonic() < end, f"{name}: {state}"
            time.sleep(0.1)
        return state

    def ends(self, name, seconds=600):
        return self.until(name, lambda state: state["state"] in ("done", "failed", "stopped"), seconds)


@contextmanager
def loopback(place, **options):
    """Set a federation up, start it, and end it."""
    made = Loopback(place, **options)
    try:
        made.start()
        yield made
    finally:
        made.stop()
