"""The privacy ledger of a run as it goes: what is noted before and after a round, when to stop, what to say."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from fedllm.app.build import Parts
from fedllm.app.privacy import UNITS, entries, hides_records, is_private, mark_of, open_ends
from fedllm.core.errors import FedllmError
from fedllm.core.types import State
from fedllm.exchange.ledger import NAME, Entry, Unit, note, read_ledger, spent

Held = Mapping[str, Mapping[str, int]]


def coming(parts: Parts, held: Held, asked: Sequence[str], number: int, mark: str = "") -> list[Entry]:
    """Return what round `number` puts into the ledger: see `privacy.entries`."""
    examples = {name: records_of(parts, held, name) for name in asked} if hides_records(parts.recipe) else {}
    return entries(parts.recipe, len(parts.silos.names), examples, asked, number, mark)


def records_of(parts: Parts, held: Held, name: str) -> int:
    """Return how many examples a silo learns from."""
    here = parts.silos.shards[name].train
    return len(parts.silos.examples(name)["train"]) if here else held[name]["train"]


def before_round(folder: Path, parts: Parts, held: Held, asked: Sequence[str], number: int) -> None:
    """Note what the silos' own noise in a round costs, before they are asked."""
    if is_private(parts.recipe):
        note(folder / NAME, coming(parts, held, asked, number))


def after_round(folder: Path, parts: Parts, held: Held, state: State) -> dict[str, Any]:
    """Note what the server's noise cost, before anybody sees its result; return what the round's event says of it."""
    if not is_private(parts.recipe):
        return {}
    mark = mark_of(state.transforms)
    ledger = note(folder / NAME, coming(parts, held, [], state.round, mark) if mark else [])
    delta = parts.recipe.privacy.delta
    found = {unit: max(each.best for each in spent(ledger, unit, delta).values()) for unit in claimed(ledger)}
    return {"epsilon": found}


def reached(folder: Path, parts: Parts, held: Held, number: int) -> str:
    """Say that round `number` would spend more than `privacy.stop_at_epsilon`, or nothing.

    Raises:
        FedllmError: if it is the first round, of which there would be no result.
    """
    limit, delta = parts.recipe.privacy.stop_at_epsilon, parts.recipe.privacy.delta
    if limit is None:
        return ""
    known = read_ledger(folder / NAME)
    again = {entry.round for entry in known}
    asked = list(parts.select(number - 1))
    new = [] if number in again else [*coming(parts, held, asked, number), *coming(parts, held, asked, number, "next")]
    for unit in dict.fromkeys(entry.unit for entry in [*known, *new]):
        most = max(each.best for each in spent([*known, *new], unit, delta).values())
        if most > limit:
            why = f"would bring epsilon to {most:.3g} and privacy.stop_at_epsilon is {limit:g}"
            if number == 1:
                raise FedllmError(f"The first round {why}; add noise or raise it.")
            return f"stopped after round {number - 1}: the next one {why}"
    return ""


def told(folder: Path, parts: Parts) -> dict[str, Any]:
    """Return what a finished run says of its privacy, or nothing where it can claim none."""
    recipe = parts.recipe
    if not is_private(recipe):
        return {}
    ledger, delta, claims = read_ledger(folder / NAME), recipe.privacy.delta, list[dict[str, Any]]()
    for unit in claimed(ledger):
        each = spent(ledger, unit, delta)
        most = max(each.values(), key=lambda found: found.best)
        own = [entry for entry in ledger if entry.unit == unit]
        claims.append(
            {
                "unit": unit,
                "hides": UNITS[unit],
                "epsilon": most.best,
                "rdp": most.rdp,
                "pld": most.pld,
                "silos": {name: found.best for name, found in each.items() if name},
                "by": sorted({"server" if entry.mark else "silo" for entry in own if entry.round}),
                "uses": looks(own),
            }
        )
    return {"privacy": {"delta": delta, "claims": claims, "open": open_ends(recipe)}}


def claimed(ledger: Sequence[Entry]) -> list[Unit]:
    """Return the units of which a run can claim something: those that its training hides."""
    return list(dict.fromkeys(entry.unit for entry in ledger if entry.what.startswith("training")))


def looks(ledger: Sequence[Entry]) -> list[dict[str, Any]]:
    """Return the ledger's entries by kind: what, how it was noised, and how often."""
    found: dict[tuple[Any, ...], int] = {}
    for entry in ledger:
        alike = (entry.what, entry.mechanism._replace(times=1))
        found[alike] = found.get(alike, 0) + entry.mechanism.times
    return [{"what": what, **mechanism._asdict(), "times": count} for (what, mechanism), count in found.items()]
