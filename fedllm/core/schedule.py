"""Learning rates over a run, as pure functions of the step's number: whoever joins late is where all the others are."""

from __future__ import annotations

import math
from typing import Literal, NamedTuple, TypeAlias

from fedllm.core.errors import FedllmError

Shape: TypeAlias = Literal["constant", "linear", "cosine"]


class Schedule(NamedTuple):
    """A factor of the learning rate over a run; `warmup` below 1 is a share of all steps."""

    shape: Shape = "constant"
    warmup: float = 0.0
    floor: float = 0.0


def factor(schedule: Schedule, step: int, total: int) -> float:
    """Return the factor of the learning rate at a step, counted from 0, of `total`.

    It rises linearly over the first `warmup` steps, of which the last has the whole rate, and falls from there to
    `floor`, which is reached where the run ends and kept after it: along a line, or as
    floor + (1 - floor) * (1 + cos(pi * progress)) / 2 (Loshchilov and Hutter 2017, arXiv:1608.03983, equation 5).

    >>> [factor(Schedule("linear", warmup=2, floor=0.5), step, 6) for step in range(7)]
    [0.5, 1.0, 1.0, 0.875, 0.75, 0.625, 0.5]
    """
    warmup = schedule.warmup if schedule.warmup >= 1 else round(schedule.warmup * total)
    if step < warmup:
        return (step + 1) / warmup
    if schedule.shape == "constant":
        return 1.0
    progress = min(1.0, (step - warmup) / max(1.0, total - warmup))
    left = 1 - progress if schedule.shape == "linear" else (1 + math.cos(math.pi * progress)) / 2
    return schedule.floor + (1 - schedule.floor) * left


def require_schedule(where: str, schedule: Schedule, rounds: int | None) -> None:
    """Raise unless the schedule makes sense for a run of so many rounds; `where` is the recipe's table."""
    if schedule.warmup < 0 or (schedule.warmup > 1 and schedule.warmup != int(schedule.warmup)):
        raise FedllmError(
            f"{where}.warmup is {schedule.warmup:g}; give a whole number, or a share of the run between 0 and 1."
        )
    if not 0 <= schedule.floor <= 1:
        raise FedllmError(f"{where}.floor is {schedule.floor:g}; it is a share of the learning rate, from 0 to 1.")
    if rounds is None and (schedule.shape != "constant" or 0 < schedule.warmup < 1):
        raise FedllmError(f"{where}.rounds is missing; the schedule of the learning rate needs the run's length.")
