"""What a site's administrator writes in `site.toml`: where the text is, and what may be done with it."""

from __future__ import annotations

import tomllib
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fedllm.core.errors import FedllmError, first_problem, nearest

NAME = r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}"
"""What a run or a site may be called: names become names of files."""

SHA256 = r"[0-9a-f]{64}"

METRICS = (
    "train_loss", "loss", "accuracy", "calibrated", "tokens", "calls", "scored", "train", "test", "skipped", "cleaned",
    "copied", "personal", "withheld",
)  # fmt: skip
"""Scalars that may leave a site that says nothing about them: means and counts over its text."""

Known = Mapping[str, Collection[str]]
"""What recipes can name: kind -> names, as in the catalogue."""

Names = tuple[str, ...] | None
Hash = Annotated[str, Field(pattern=f"^{SHA256}$")]


class Closed(BaseModel):
    """A table whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class SiteData(Closed):
    """How this site's text is read."""

    train: str | None = None
    """A file, a folder, or the URL of a database."""
    test: str | None = None
    query: str | None = None
    columns: dict[str, str] = {}
    """The recipe's name of a column -> its name here."""
    templates: str | None = None
    """Prompt templates that the site adds to a library."""


class Base(Closed):
    """A base model that this site allows."""

    path: str | None = None
    sha256: Hash | None = None
    url: str | None = None
    """Of the base "endpoint": the API that the site sends its text to; a recipe's own is never used."""
    key_env: str | None = None
    """The environment variable that has its key."""


class Policy(Closed):
    """What the site allows; a key that is not there sets no limit, unless said."""

    recipes: tuple[Hash, ...] | None = None
    """Recipes by hash; without it any recipe that the other rules allow."""
    users: Names = None
    algorithms: Names = None
    trainables: Names = None
    tasks: Names = None
    clients: Names = None
    selects: Names = None
    shares: Names = None
    aggregates: Names = None
    optimisers: Names = None
    transforms: Names = None
    rounds_a_run: int | None = Field(None, ge=0)
    rounds_a_day: int | None = Field(None, ge=0)
    """Rounds of training that may begin within 24 hours."""
    tokens_a_day: int | None = Field(None, ge=0)
    """Tokens read for training and scoring within 24 hours after which nothing new begins."""
    clip: float | None = Field(None, gt=0)
    """The largest L2 norm of an update that may leave."""
    epsilon: float | None = Field(None, gt=0)
    """What all runs together may spend of this site's text, over the life of its state folder."""
    delta: float = Field(1e-5, gt=0, lt=1)
    """At which epsilon is reckoned here."""
    trust_server: bool = False
    """Whether noise that only the server adds counts."""
    trust_sites: bool = False
    """Whether noise counts of which other sites add their parts."""
    secure_aggregation: bool = False
    """Whether only sums with other sites' updates may leave."""
    duplicates: bool = True
    """Whether salted hashes of the texts may leave, to find those that several sites have."""
    metrics: tuple[str, ...] = METRICS
    """Scalars that may leave; others are taken out of replies. How much text stands behind a reply always leaves."""
    max_message_mb: float = Field(2000, gt=0)


class Site(Closed):
    """A site: `site.toml`, its paths made absolute."""

    name: str = Field(pattern=f"^{NAME}$")
    state: str = "state"
    """Folder for what the site keeps of its runs."""
    kit: str = "kit"
    """Folder with the site's key and certificates."""
    threads: int | None = Field(None, gt=0)
    processes: int = Field(1, gt=0)
    data: SiteData = SiteData()
    models: dict[str, Base] = {}
    """The base models that are allowed, by their name in recipes; without any, all are."""
    policy: Policy = Policy()


KINDS = {
    "tasks": "task",
    "trainables": "trainable",
    "clients": "client",
    "selects": "select",
    "shares": "share",
    "aggregates": "aggregate",
    "optimisers": "optimiser",
    "transforms": "transforms",
}
"""Rules that list names -> where recipes and the catalogue have those names."""

TABLES: dict[str, type[Closed]] = {"": Site, "data": SiteData, "models": Base, "policy": Policy}
"""The tables of a site's file."""


def read_site(path: Path, known: Known | None = None) -> Site:
    """Read a site's file; relative folders start from where it lies.

    Without `known`, which takes seconds to load, the names in its rules are not checked.

    Raises:
        FedllmError: for what is not TOML, a key that is not known, or a name that no recipe can have.
    """
    try:
        table = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise FedllmError(f"There is no site file '{path}'; `fedllm site request` makes one.") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, IsADirectoryError) as error:
        raise FedllmError(f"The site file '{path}' is not TOML: {error}.") from error
    try:
        site = Site.model_validate(table)
    except ValidationError as error:
        known_keys = {name: list(table.__pydantic_fields__) for name, table in TABLES.items()}
        raise FedllmError(f"{path}: {first_problem(error.errors(), known_keys)}") from error
    for rule, kind in KINDS.items():
        for name in getattr(site.policy, rule) or ():
            if known is not None and name not in known[kind]:
                raise FedllmError(f"{path}: policy.{rule} has '{name}'; {nearest(name, known[kind])}")
    folder = path.absolute().parent
    models = {
        name: base.model_copy(update={"path": base.path and str(folder / Path(base.path).expanduser())})
        for name, base in site.models.items()
    }
    paths = {"state": str(folder / site.state), "kit": str(folder / site.kit)}
    return site.model_copy(update={**paths, "models": models})
