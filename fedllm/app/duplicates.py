"""Texts that several silos of a run have: each stays at one of them, by hashes that say nothing without the salt.

On one machine the salt is made of the recipe's seed, since one process holds all texts anyway; between machines it is
the sites' own secret.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.algorithms.duplicates import shared_duplicates
from fedllm.app.config import Duplicates, Recipe
from fedllm.app.rows import Shard
from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.core.types import Exchange, Silo
from fedllm.exchange.select import everyone
from fedllm.runtime.local import local
from fedllm.runtime.store import append_event, read_events
from fedllm.silo.cleaning import text_of
from fedllm.silo.dedupe import without
from fedllm.silo.spooled import Mapped

COUNTED = "shared_duplicates.dropped"


def apart(shards: dict[str, Shard], recipe: Recipe) -> dict[str, Shard]:
    """Return the silos of one machine without the texts that another one of them keeps, if the recipe asks for it."""
    wanted = recipe.duplicates
    if wanted is None or len(shards) < 2:
        return shards
    salt, memory = f"{derive(recipe.seed, 'salt'):032x}".encode(), dict[str, Any]()
    algorithm = shared_duplicates(everyone(list(shards)), salt=lambda: salt)
    exchange = local(algorithm.client, lambda name: texts_of(name, shards[name], wanted), memory)
    algorithm.server(algorithm.init({}), exchange)
    return {name: kept(name, shard, memory[name]["drop"], recipe, salt) for name, shard in shards.items()}


def texts_of(name: str, shard: Shard, wanted: Duplicates) -> Silo:
    """Return a silo whose data are its texts, read when asked for."""
    parts = {"train": shard.train, "test": shard.test}
    data = {part: Mapped(rows, lambda row: text_of(row, wanted.text)) for part, rows in parts.items()}
    return Silo(name, None, data, {}, 0)  # type: ignore[arg-type]


def kept(name: str, shard: Shard, drop_N2: Any, recipe: Recipe, salt: bytes) -> Shard:
    """Return a silo without the texts of these fingerprints, and with their number among what was counted."""
    assert recipe.duplicates is not None
    text, counts = recipe.duplicates.text, dict(shard.cleaned)
    train, test = (without(rows, text, salt, drop_N2) for rows in (shard.train, shard.test))
    if not train or not test:
        raise FedllmError(
            f"silos.{name}: other silos have all of its texts to {'learn from' if not train else 'test with'}, and "
            "keep them; give it other text, or take [duplicates] out."
        )
    gone = len(shard.train) + len(shard.test) - len(train) - len(test)
    counts[f"{len(recipe.cleaning)}.{COUNTED}"] = gone
    if "kept" in counts:
        counts["kept"] -= gone
    return Shard(train, test, counts)


def between(folder: Path, recipe: Recipe, names: list[str], exchange: Exchange, why: Mapping[str, str]) -> str:
    """Let the sites of a federation find what several of them have, unless that was done; say what came of it.

    `why` has the reasons of sites that did not answer. What a site drops it remembers itself.

    Raises:
        FedllmError: if fewer than two sites could be compared.
    """
    if any(event["event"] == "duplicates" for event in read_events(folder)):
        return ""
    algorithm = shared_duplicates(everyone(names), salt=none_here)
    _, report = algorithm.server(algorithm.init({}), exchange)
    counts = {key.removeprefix("shared."): int(value) for key, value in report.items() if key.startswith("shared.")}
    absent = {name: why.get(name) or str(report.get(f"dropped.{name}", "no reply")) for name in names}
    absent = {name: reason for name, reason in absent.items() if name not in counts}
    told = "; ".join(f"{name}: {reason.rstrip('.')}" for name, reason in absent.items())
    if len(counts) < 2:
        raise FedllmError(
            f"[duplicates] compares the texts of sites, and {len(counts)} of {len(names)} took part ({told}); mend "
            "that, or take [duplicates] out of the recipe."
        )
    append_event(folder, {"event": "duplicates", "dropped": counts, "absent": absent})
    said = f"{sum(counts.values()):,} texts that several sites have stay at one of them"
    return f"{said}; not compared: {told}" if absent else said


def none_here() -> bytes:
    """Refuse: a server has no salt."""
    raise FedllmError("The server of [duplicates] has no salt, and must not have one.")
