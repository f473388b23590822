"""The server's half of a run between machines: ask the sites, then the same rounds as on one machine."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

import fedllm
from fedllm.app.build import Parts, build
from fedllm.app.config import Recipe, read_recipe, read_toml
from fedllm.app.progress import Ui
from fedllm.app.run import go
from fedllm.app.scores import check_files
from fedllm.app.stages import Nodes
from fedllm.core.errors import FedllmError
from fedllm.core.types import Request
from fedllm.runtime.line import Aborted, Line, Unreachable
from fedllm.runtime.remote import remote
from fedllm.runtime.store import append_event, locked, read_events, trim_events, write_text
from fedllm.runtime.wire import message_bytes
from fedllm.silo.models import weights_sha256

ANSWER_BYTES = 1 << 16
"""The most that a reply without tensors takes, and the head of one with them."""

SAID = 200
"""Lines of a run that are kept for whoever looks."""


class Live:
    """What can be seen of a run while it goes on: `live.json`, written at most once a second and at every turn."""

    def __init__(self, folder: Path, rounds: int) -> None:
        self.folder = folder
        self.said: list[str] = []
        self._told: dict[str, Any] = {"state": "asking", "round": 0, "rounds": rounds, "sites": {}}
        self._lock, self._written, self._over = threading.Lock(), 0.0, threading.Event()
        self._beat = threading.Thread(target=self._beats, daemon=True)

    def __enter__(self) -> Live:
        self._write()
        self._beat.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        self._over.set()
        # What the engine ended goes on in another job; only the run's own faults are its end.
        if isinstance(error, FedllmError) and not isinstance(error, Aborted):
            self.say(str(error))
            self.turn(state="failed")
        elif error is None:
            self.turn(state="done")

    def turn(self, **changes: Any) -> None:
        """Note that the run has come to another state or round."""
        with self._lock:
            self._told |= changes
        self._write()

    def site(self, name: str, told: Mapping[str, Any]) -> None:
        """Note what a site is at."""
        with self._lock:
            sites = self._told["sites"]
            sites[name] = {**sites.get(name, {}), **told}
        if time.monotonic() - self._written > 1:
            self._write()

    def say(self, text: str) -> None:
        """Keep a line for those who look, and in the run's log."""
        with self._lock:
            self.said = [*self.said, text][-SAID:]
        with (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
        self._write()

    def _beats(self) -> None:
        while not self._over.wait(2):
            self._write()

    def _write(self) -> None:
        with self._lock:
            self._written = time.monotonic()
            write_text(self.folder / "live.json", json.dumps({**self._told, "says": self.said[-8:]}))


class Lines(Ui):
    """The progress of a run whose terminal is elsewhere: its lines go to `live.json` and the log."""

    def __init__(self, live: Live) -> None:
        super().__init__(Console(quiet=True))
        self.live = live

    def say(self, text: str) -> None:
        """Keep the line."""
        self.live.say(text)

    def whole(self, what: str, total: int, done: int = 0) -> None:
        """Note the round."""
        if what == "rounds":
            self.live.turn(state="running", round=done, rounds=total)


def lead(folder: Path, line: Line, expected: Sequence[str]) -> None:
    """Run the recipe in the folder with the sites at the other end of the line; go on from its last checkpoint.

    Who started the run stands in `run.json` beside the recipe.

    Raises:
        FedllmError: what ends the run, in one sentence.
        Aborted: the engine's job ended; the run goes on in the next one.
    """
    recipe = read_recipe(read_toml(folder / "recipe.toml"))
    with locked(folder), Live(folder, recipe.rounds) as live, Lines(live) as ui:
        # A kill may have left half a line, after which nothing could be written.
        trim_events(folder, recipe.rounds)
        check_files(recipe)
        names = taking_part(folder, recipe, line, expected, live)
        live.say("opening the model")
        parts = build(recipe, elsewhere=names)
        nodes = reach(folder, parts, line, live)
        go(folder, parts, ui, nodes)


def asked_of_sites(recipe: Recipe) -> dict[str, Any]:
    """Return what a site is told of a recipe: all but whose text lies where."""
    return recipe.model_dump(mode="json", exclude_none=True, exclude={"silos", "partition", "federation"})


def taking_part(folder: Path, recipe: Recipe, line: Line, expected: Sequence[str], live: Live) -> list[str]:
    """Ask every site whether it takes part; return those that did not refuse, the same ones after a restart.

    A site that does not answer now is one of them: it may come back in a later round.
    """
    before = [event for event in read_events(folder) if event["event"] == "asked"]
    names = list(before[0]["sites"]) if before else list(expected)
    question = {
        "do": "ask",
        "run": folder.name,
        "recipe": asked_of_sites(recipe),
        "algorithm": ["averaging"],
        "fedllm": fedllm.__version__,
        "model_sha256": weights_sha256(recipe.model),
        "user": json.loads((folder / "run.json").read_text(encoding="utf-8"))["user"],
    }
    answers: dict[str, dict[str, Any]] = {}
    for name in names:
        answers[name] = ask(line, name, question, recipe.federation.patience)
        if "error" in answers[name]:
            live.say(f"{name} refuses ({answers[name].get('rule') or 'no rule'}): {answers[name]['error']}")
        live.site(name, {"state": "refused" if "error" in answers[name] else "in"})
    willing = [name for name in names if "error" not in answers[name]]
    if len(willing) < recipe.federation.least:
        reasons = "; ".join(f"{name}: {answers[name]['error']}" for name in names if name not in willing)
        raise FedllmError(
            f"{len(willing)} of {len(names)} sites take part and federation.least is {recipe.federation.least} "
            f"({reasons}); change the recipe to what the sites allow."
        )
    if not before:
        refused = {name: answers[name]["error"] for name in names if name not in willing}
        append_event(folder, {"event": "asked", "sites": willing, "refused": refused})
        return willing
    return names


def ask(line: Line, name: str, question: dict[str, Any], patience: float) -> dict[str, Any]:
    """Ask one site, for as long as there is patience with it."""
    since = time.monotonic()
    while True:
        try:
            return line.call(name, question, b"", 10)[0]
        except Unreachable:
            if time.monotonic() - since > patience:
                return {}
            time.sleep(1)


def reach(folder: Path, parts: Parts, line: Line, live: Live) -> Nodes:
    """Return the nodes of a run whose sites are at the other end of the line, once they have opened their text."""
    recipe, why = parts.recipe, dict[str, str]()
    update = message_bytes(parts.algorithm.wire(parts.params), {}) + ANSWER_BYTES

    def note(name: str, sentence: str) -> None:
        why[name] = sentence
        live.say(f"{name}: {sentence}")

    def silent() -> dict[str, str]:
        told = dict(why)
        why.clear()
        return told

    def largest(request: Request) -> int:
        return update if request.op == "train" else ANSWER_BYTES

    exchange = remote(
        line,
        folder / "spool",
        run=folder.name,
        patience=recipe.federation.patience,
        parallel=recipe.federation.parallel,
        largest=largest,
        note=note,
        progress=live.site,
    )
    started = [event for event in read_events(folder) if event["event"] == "start"]
    if started:
        return Nodes(exchange, {}, started[0]["silos"], silent)
    live.say("each site opens the model and its text")
    held: dict[str, Mapping[str, int]] = {name: {"train": 0, "test": 0} for name in parts.silos.names}
    for reply in exchange([Request(name, 0, "open", {}) for name in parts.silos.names]):
        held[reply.client] = {part: int(reply.scalars.get(part, 0)) for part in ("train", "test")}
        live.say(f"{reply.client} is ready")
    return Nodes(exchange, {}, held, silent)
