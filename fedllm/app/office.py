"""What an administrator sees of a federation: the plan before, the sites at work, the results after."""

from __future__ import annotations

import base64
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from fedllm.app.terminal import amount, out, say
from fedllm.core.errors import FedllmError
from fedllm.federation.control import Ask, copy

if TYPE_CHECKING:
    from fedllm.app.config import Recipe

LOOK_SECONDS = 1.0
LITTLE = 50_000_000
"""Bytes of free disk below which a server is said to be full."""
WEIGHTS = ("adapter/", "model/")
RESULTS = (*WEIGHTS, "report.html", "metrics.json", "events.jsonl", "ledger.jsonl", "recipe.toml", "log.txt")


def plan_of(recipe: Recipe, sites: Sequence[str]) -> Iterator[str]:
    """Yield the plan of a run whose text lies at the sites."""
    from fedllm.app.build import build
    from fedllm.app.plan_view import plan_lines

    yield from plan_lines(build(recipe, weights=False, elsewhere=sites))
    yield ""


def watch(ask: Ask, name: str, admin: Path) -> None:
    """Show a run until it ends; Ctrl-C leaves it running. A run that failed is an error."""
    seen: list[str] = []
    try:
        with Live(console=out, refresh_per_second=2, transient=True) as screen:
            while True:
                status = ask({"do": "status", "name": name})
                run = status["runs"][name]
                told = run["live"] or {}
                for line in fresh(seen, told.get("says", [])):
                    say(line)
                if run["state"] in ("done", "failed", "stopped"):
                    break
                lines = [Text(headline(name, run)), *full(status)]
                screen.update(Group(*lines, *site_table(told.get("sites", {}))))
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt:
        say(f"{name} goes on without you; `fedllm federation attach {name}` comes back to it, `stop` stops it.")
        return
    if run["state"] == "failed":
        raise FedllmError(f"{name} failed: {run['reason']}")
    say(f"{name} is {run['state']}.")
    if run["state"] == "done":
        folder = bring(ask, name, Path("runs") / name)
        close(folder)


def close(folder: Path) -> None:
    """Print a run's comparison and where its results are."""
    from fedllm.app.results import comparisons, read_metrics, verdict

    metrics = read_metrics(folder)
    if metrics["loss"]:
        out.print(comparisons(metrics))
        out.print(verdict(metrics), highlight=False, markup=False)
    for what, file in (("Report", "report.html"), ("Adapter", "adapter"), ("Model", "model")):
        if (folder / file).exists():
            say(f"{what + ':':<9}{folder / file}")


def fresh(seen: list[str], lines: Sequence[str]) -> list[str]:
    """Return the lines that follow those already seen, and remember them."""
    start = next((n for n in range(len(lines), 0, -1) if seen[-n:] == list(lines[:n])), 0)
    seen.extend(lines[start:])
    return list(lines[start:])


def headline(name: str, run: Mapping[str, Any]) -> str:
    """Say in a line how far a run is."""
    told = run["live"] or {}
    rounds = f", round {told['round']} of {told['rounds']} done" if "rounds" in told else ""
    attempt = f", attempt {run['attempt']}" if run["attempt"] > 1 else ""
    reason = f" ({run['reason']})" if run["reason"] else ""
    return f"{name}: {run['state']}{reason}{rounds}{attempt}"


def site_table(sites: Mapping[str, Mapping[str, Any]]) -> Iterator[Table]:
    """Yield what each site is at, if any was heard of."""
    if not sites:
        return
    table = Table("site", "state", "round", "work", "step", "tokens/s", "loss", "down", "up", box=None, padding=(0, 1))
    for name, told in sites.items():
        seconds, tokens = told.get("seconds") or 0, told.get("tokens") or 0
        steps = f"{told['step']:.0f} of {told['steps']:.0f}" if told.get("steps") else ""
        table.add_row(
            name,
            str(told.get("state", "")),
            f"{told['round'] + 1:.0f}" if told.get("op") == "train" else "",
            str(told.get("op", "")),
            steps,
            f"{tokens / seconds:,.0f}" if seconds and tokens else "",
            f"{told['loss']:.3f}" if "loss" in told else "",
            amount(told.get("bytes_down", 0)),
            amount(told.get("bytes_up", 0)),
        )
    yield table


def full(told: Mapping[str, Any]) -> Iterator[Text]:
    """Yield a warning where the server's disk has hardly any room."""
    if (free := told.get("free", LITTLE)) < LITTLE:
        yield Text(f"The server's disk has {free / 1e6:.1f} MB left; make room there.", style="red")


def status_table(told: Mapping[str, Any]) -> Iterator[Table | Text]:
    """Yield the sites, and the runs with what their sites are at."""
    yield from full(told)
    sites = Table("site", "connected", box=None, padding=(0, 1))
    for name, site in told["sites"].items():
        sites.add_row(name, "revoked" if site["revoked"] else "yes" if site["connected"] else "no")
    yield sites
    runs = Table(box=None, padding=(0, 1), expand=True)
    for head in ("run", "state", "rounds", "attempt", "started by"):
        runs.add_column(head, no_wrap=True)
    # Of many runs a line each, in the room that the rest leaves; all that there is to say of one is said below.
    runs.add_column("last word", no_wrap=True, overflow="ellipsis", ratio=1)
    for name, run in told["runs"].items():
        live = run["live"] or {}
        rounds = f"{live.get('round', 0)} of {live.get('rounds', '?')}"
        word = run["reason"] or (live.get("says") or [""])[-1]
        runs.add_row(name, run["state"], rounds, str(run["attempt"]), str(run["user"]), word)
    yield runs
    if len(told["runs"]) == 1:
        for run in told["runs"].values():
            yield from site_table((run["live"] or {}).get("sites", {}))
            if run["reason"]:
                yield Text(run["reason"])


def log_lines(ask: Ask, name: str, engine: bool, lines: int) -> list[str]:
    """Return the last lines of a run's own log, or of the engine's."""
    if engine:
        return [str(line) for line in ask({"do": "logs", "name": name, "lines": lines})["lines"]]
    return read_file(ask, name, "log.txt").decode(errors="replace").splitlines()[-lines:]


def bring(ask: Ask, name: str, folder: Path) -> Path:
    """Copy a run's results here."""
    for path, size in ask({"do": "files", "name": name})["files"].items():
        relative = Path(path)
        if path.startswith(RESULTS) and not relative.is_absolute() and ".." not in relative.parts:
            # A report or a list of events of the same length may still be another one.
            if not path.startswith(WEIGHTS):
                (folder / relative).unlink(missing_ok=True)
            copy(ask, name, path, size, folder / relative, lambda count: None)
    return folder


def read_file(ask: Ask, name: str, path: str) -> bytes:
    """Return a file of a run, part by part."""
    data = b""
    while True:
        part = ask({"do": "read", "name": name, "path": path, "offset": len(data)})
        data += base64.b64decode(part["data"])
        if len(data) >= part["size"] or not part["data"]:
            return data
