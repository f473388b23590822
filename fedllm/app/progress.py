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
    Task,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from fedllm.core.errors import Interrupted


class TimeLeftColumn(TimeRemainingColumn):
    """The time left, said to be that; nothing while it is unknown."""

    def render(self, task: Task) -> Text:
        """Return the time left as text."""
        if task.time_remaining is None:
            return Text("")
        return super().render(task).append(" left")


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
            TextColumn("{task.description:<24}", style="bold", markup=False),
            BarColumn(bar_width=max(6, min(28, self.console.width - 72))),
            MofNCompleteColumn(),
            TextColumn("{task.fields[note]:<15}", markup=False),
            TimeElapsedColumn(),
            TimeLeftColumn(),
            console=self.console,
            disable=not self.console.is_terminal,
            # A round may take minutes, and its speed is that of the round before it.
            speed_estimate_period=3600,
        )
        self._whole: TaskID | None = None
        self._part: TaskID | None = None
        self._what, self._share, self._done = "", 0.0, 0
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
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.console.is_terminal)

    def whole(self, what: str, total: int, done: int = 0) -> None:
        """Show how far the whole run is: `done` of `total` parts."""
        self._done = done
        if self._whole is not None and self._bars.tasks[0].description == what:
            self._bars.update(self._whole, total=total, completed=done)
            return
        if self._whole is not None:
            self._bars.remove_task(self._whole)
        self._whole = self._bars.add_task(what, total=total, completed=done, note="")

    @contextmanager
    def part(self, what: str, steps: int | None, counts: bool = False) -> Iterator[None]:
        """Show a part of the run that takes so many steps (unknown if None); if it `counts` it is 1 of the whole."""
        self.tokens, self.since = 0, time.perf_counter()
        self._what, self._share = what, 1 / steps if counts and steps else 0.0
        self._part = self._bars.add_task(what, total=steps, note="")
        try:
            yield
        finally:
            self._bars.remove_task(self._part)
            self._part, self._share = None, 0.0

    def at(self, silo: str) -> None:
        """Name the silo at work."""
        if self._part is not None:
            self._bars.update(self._part, description=f"{self._what} · {silo}"[:24])

    def tick(self, tokens: int) -> None:
        """Note one step of so many tokens."""
        if self.stopping:
            raise Interrupted
        self.tokens += tokens
        if self._part is not None:
            speed = self.tokens / max(1e-9, time.perf_counter() - self.since)
            self._bars.update(self._part, advance=1, note=f"{speed:,.0f} tokens/s")
        if self._whole is not None and self._share:
            self._bars.advance(self._whole, self._share)
