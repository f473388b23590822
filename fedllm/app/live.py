"""What can be seen of a run whose terminal is elsewhere: `live.json` and `log.txt` in its folder."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rich.console import Console

from fedllm.app.progress import Ui
from fedllm.core.errors import FedllmError
from fedllm.runtime.line import Aborted
from fedllm.runtime.store import on_disk, write_text

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
            # A disk that is full must not put its own error in the place of this one, which says so.
            with suppress(FedllmError):
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
        with on_disk(self.folder / "log.txt"), (self.folder / "log.txt").open("a", encoding="utf-8") as file:
            file.write(f"{time.strftime('%Y-%m-%dT%H:%M:%S')} {text}\n")
        self._write()

    def _beats(self) -> None:
        while not self._over.wait(2):
            # What cannot be shown now is shown when there is room; the run itself says what it cannot write.
            with suppress(FedllmError):
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
