"""What a person sees while a run works: rounds, the silo at work, steps, tokens a second, time left."""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from fedllm.core.errors import Interrupted


class Ui:
    """Bars on a terminal, plain lines elsewhere, nothing when quiet; and the first Ctrl-C.

    The first Ctrl-C lets the current step end and raises `Interrupted`; a second one kills at once,
    which loses no more, since every round is on disk.
    """

    def __init__(self, console: Console | None) -> None:
        self.console = console or Console(quiet=True)
        self.stopping = False
        self.tokens, self.since = 0, time.perf_counter()
        self._bars = Progress(
            TextColumn("[bold]{task.description:<28}"),
            BarColumn(bar_width=28),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]}"),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
        )
        self._whole: TaskID | None = None
        self._part: TaskID | None = None
        self._before: Any = None

    def __enter__(self) -> Ui:
        if threading.current_thread() is threading.main_thread():
            self._before = signal.signal(signal.SIGINT, self._interrupt)
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._bars.stop()
        if self._before is not None:
            signal.signal(signal.SIGINT, self._before)

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        if self.stopping:
            raise KeyboardInterrupt
        self.stopping = True
        self.say("Stopping after this step; press Ctrl-C again to stop at once.")

    def say(self, text: str) -> None:
        """Print one line above the bars."""
        self.console.print(text, highlight=False)

    def whole(self, what: str, total: int, done: int = 0) -> None:
        """Show how far the whole run is: `done` of `total` parts."""
        if self._whole is None:
            self._whole = self._bars.add_task(what, total=total, completed=done, note="")
        else:
            self._bars.update(self._whole, description=what, total=total, completed=done)

    @contextmanager
    def part(self, what: str, steps: int | None) -> Iterator[None]:
        """Show a part of the run that takes so many steps (unknown if None)."""
        self.tokens, self.since = 0, time.perf_counter()
        self._part = self._bars.add_task(what, total=steps, note="")
        try:
            yield
        finally:
            self._bars.remove_task(self._part)
            self._part = None

    def at(self, silo: str, what: str) -> None:
        """Name the silo at work."""
        if self._part is not None:
            self._bars.update(self._part, description=f"{what} · {silo}"[:28])

    def tick(self, tokens: int) -> None:
        """Note one step of so many tokens."""
        if self.stopping:
            raise Interrupted
        self.tokens += tokens
        if self._part is not None:
            speed = self.tokens / max(1e-9, time.perf_counter() - self.since)
            self._bars.update(self._part, advance=1, note=f"{speed:,.0f} tokens/s")
