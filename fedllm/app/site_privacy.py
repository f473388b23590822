"""What a recipe would spend of a site's text, and what all runs there have spent: the site's own ledger."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.app.config import Recipe, read_recipe
from fedllm.app.privacy import AT_SERVER, AT_SILO, TOGETHER, hides_records, noisy, record_noise, record_steps
from fedllm.core.errors import FedllmError
from fedllm.exchange.accounting import Mechanism, epsilon
from fedllm.exchange.ledger import NAME, Entry, note, read_ledger
from fedllm.federation.site.policy import Site
from fedllm.federation.site.rules import Spending


def spending(site: Site, site_toml: Path) -> Spending:
    """Return the site's accountant: `after` says epsilon before and after a run, `note` writes a round down.

    It counts over the life of the site's state folder. As long as all noise hid the whole site, epsilon is of the site
    with all that it has; once a run hid records, it is of one record, whom noise for the whole site hides half as well
    as the site: a record that changes can turn an update round.
    """
    path = Path(site.state) / NAME

    def after(asked: Mapping[str, Any], run: str) -> tuple[float, float]:
        known = [entry for entry in read_ledger(path) if entry.silo != run]
        recipe = read_recipe(asked)
        whole = [entry._replace(mechanism=times(entry.mechanism, recipe.rounds)) for entry in of_round(recipe, run, 0)]
        return total(known, site.policy.delta), total([*known, *whole], site.policy.delta)

    def of_round(recipe: Recipe, run: str, number: int) -> list[Entry]:
        found, part = list[Entry](), noisy(recipe)
        if part and part["name"] in (*AT_SERVER, *AT_SILO, *TOGETHER):
            if part.get("noise") is None:
                raise FedllmError("The recipe does not say its noise; the server has to solve for it before it asks.")
            # The server says when this site is asked, so that it cannot count on chance.
            found.append(Entry(number, "training", "silo", run, "", Mechanism(float(part["noise"]))))
        if hides_records(recipe):
            records = records_here(recipe, site_toml)
            noise = record_noise(recipe, records)
            found.append(Entry(number, "training", "record", run, "", record_steps(recipe, records, noise)))
        return found

    def write(asked: Mapping[str, Any], run: str, number: int) -> None:
        note(path, of_round(read_recipe(asked), run, number + 1))

    return Spending(after, write)


def records_here(recipe: Recipe, site_toml: Path) -> int:
    """Return how many records this site learns from; where the recipe says their rate, its text is not looked at."""
    if recipe.client.get("rate") is not None:
        return 1
    from fedllm.app.build import load_tokenizer, make
    from fedllm.app.data import Silos, open_shards
    from fedllm.app.site import own_recipe

    own = own_recipe(recipe.model_dump(exclude_none=True), site_toml)
    silos = Silos(open_shards(own), make("task", own.task, load_tokenizer(own.model)))
    return len(silos.examples(silos.names[0])["train"])


def times(mechanism: Mechanism, rounds: int) -> Mechanism:
    """Return what so many rounds cost."""
    return mechanism._replace(times=mechanism.times * rounds)


def total(ledger: list[Entry], delta: float) -> float:
    """Return epsilon of all entries together."""
    records = any(entry.unit == "record" for entry in ledger)
    return epsilon(
        [
            entry.mechanism._replace(multiplier=entry.mechanism.multiplier / 2)
            if records and entry.unit == "silo"
            else entry.mechanism
            for entry in ledger
        ],
        delta,
    )
