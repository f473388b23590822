"""What may be spent at a model behind an API: reserved before a request, settled after it, kept in a file."""

from __future__ import annotations

import json
import os
import threading
from pathlib import Path
from typing import NamedTuple

from fedllm.core.errors import FedllmError
from fedllm.silo.speaker import Used


class Spent(Exception):
    """The budget has no room for another request."""


class Budget(NamedTuple):
    """What may be spent at most; None is no limit. Prices are for a million tokens, in whatever money `cost` is."""

    calls: int | None = None
    tokens: int | None = None
    cost: float | None = None
    price_read: float = 0.0
    price_written: float = 0.0

    def of(self, read: int, written: int) -> float:
        """Return what so many tokens cost.

        >>> Budget(price_read=0.5, price_written=2.0).of(1_000_000, 500_000)
        1.5
        """
        return (read * self.price_read + written * self.price_written) / 1e6


class Purse:
    """Counts what is spent; threads may share it. With a file the count outlives the process."""

    def __init__(self, budget: Budget) -> None:
        self.budget, self.used = budget, Used()
        self._reserved, self._lock, self._file = Used(), threading.Lock(), Path()

    def keep(self, file: Path) -> None:
        """Go on from what the file says was spent, and write there from now on."""
        try:
            if file.exists():
                self.used = Used(**json.loads(file.read_text(encoding="utf-8")))
        except (ValueError, TypeError) as error:
            raise FedllmError(
                f"'{file}' does not say what was spent; write it by hand, such as {{\"calls\": 90}}."
            ) from error
        self._file = file

    def reserve(self, read: int, written: int) -> Used:
        """Set aside what a request can cost at most, or raise `Spent`."""
        asked = Used(1, read, written, self.budget.of(read, written))
        with self._lock:
            whole = added(added(self.used, self._reserved), asked)
            for name, limit, value in (
                ("calls", self.budget.calls, whole.calls),
                ("tokens", self.budget.tokens, whole.read + whole.written),
                ("cost", self.budget.cost, whole.cost),
            ):
                if limit is not None and value > limit:
                    raise Spent(f"its budget of {limit:g} {name} has no room for another request")
            self._reserved = added(self._reserved, asked)
        return asked

    def settle(self, reserved: Used, read: int | None = None, written: int | None = None) -> None:
        """Put what a request did cost in the place of what was set aside; without numbers it is all of it."""
        took = reserved
        if read is not None and written is not None:
            took = Used(1, read, written, self.budget.of(read, written))
        with self._lock:
            self._reserved = added(self._reserved, reserved, -1)
            self.used = added(self.used, took)
            if self._file.name:
                beside = self._file.with_name(f".{self._file.name}.{os.getpid()}")
                beside.write_text(json.dumps(self.used._asdict()) + "\n", encoding="utf-8")
                beside.rename(self._file)


def added(first: Used, second: Used, sign: int = 1) -> Used:
    """Return the sum (or the difference) of two counts."""
    return Used(
        first.calls + sign * second.calls,
        first.read + sign * second.read,
        first.written + sign * second.written,
        first.cost + sign * second.cost,
    )
