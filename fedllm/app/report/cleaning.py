"""What the data work at the silos counted, for the report."""

from __future__ import annotations

from typing import Any

from fedllm.app.report.data import Run, losses, part
from fedllm.app.report.words import number, plain

ALL_SHOWN = 40
"""Up to so many silos have a row each."""

COUNTS = 24
"""Counts of data work that are shown at most."""


def table(run: Run) -> dict[str, Any]:
    """Return what the data work counted, by silo and step; of many silos the sums over all."""
    counts = {name: losses(told) for name, told in part(run.start, "cleaned").items()}
    keys = sorted({key for told in counts.values() for key in told}, key=step_place)[:COUNTS]
    rows = {plain(name): told for name, told in counts.items()}
    if len(rows) > ALL_SHOWN:
        rows = {f"all {len(rows):,} silos": {key: sum(told.get(key, 0) for told in rows.values()) for key in keys}}
    return {
        "heads": [plain(title_of(key)) for key in keys],
        "rows": [[name, *(number(told.get(key, 0), 0) for key in keys)] for name, told in rows.items()],
    }


def step_place(key: str) -> tuple[int, str]:
    """Return where a count stands: what was read, the steps in their order, what was kept, the rest.

    >>> sorted(["kept", "1.pii.masked", "0.utf8.not UTF-8", "read"], key=step_place)
    ['read', '0.utf8.not UTF-8', '1.pii.masked', 'kept']
    """
    first = key.partition(".")[0]
    place = {"lines that are not UTF-8": -2, "read": -1, "kept": 10_000}.get(key, 10_001)
    return (int(first[:4]) if first.isdecimal() else place, key)


def title_of(key: str) -> str:
    """Return what a count is called.

    >>> title_of("1.quality.too short"), title_of("kept")
    ('quality: too short', 'kept')
    """
    _, point, rest = key.partition(".")
    return rest.replace("_", " ").replace(".", ": ", 1) if point else key


def cleaned_away(counts: dict[str, Any]) -> str:
    """Say what cleaning counted over all silos."""
    total: dict[str, int] = {}
    for told in counts.values():
        for what, count in (told if isinstance(told, dict) else {}).items():
            total[what.partition(".")[2] or what] = total.get(what.partition(".")[2] or what, 0) + int(count)
    return ", ".join(f"{what} {count:,}" for what, count in total.items() if count)
