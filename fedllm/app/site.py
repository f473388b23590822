"""A site's own view of a recipe that came over the wire: its text, its model folder, its threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.app.catalog import CATALOG
from fedllm.app.config import Recipe, SiloFiles, read_recipe
from fedllm.core.errors import FedllmError
from fedllm.federation.policy import Site, read_site

DATA = "FEDLLM_DATA"
"""The environment variable by which `fedllm site start --data` reaches the worker."""

TEMPLATE = """\
# This file belongs to the site. Nothing is done here that it does not allow.
name = "{name}"
# threads = 2                       # processor threads of training; all of them if nothing is said

[data]
# train = "my.jsonl"                # a file, a folder, docstrings:PACKAGE or a database's URL;
# test = "my_test.jsonl"            # `fedllm site start --data my.jsonl` says it for one start
# query = "select prompt, response from notes"          # where train is a database's URL
# columns = {{ prompt = "frage", response = "antwort" }}  # the recipe's name of a column = its name here
# A recipe with [duplicates] needs FEDLLM_SALT in the environment: a secret of the sites that the server must not have.

[models]
# The base models that recipes may name here; with a path it is loaded from there, with a sha256 nothing else is.
"smollm2-135m-instruct" = {{}}

[policy]
# What is not said sets no limit. `fedllm site check RECIPE` shows what a recipe would do here.
# users = ["admin@example.org"]     # who may start runs
# recipes = ["<sha256>"]            # these recipes only
# trainables = ["lora"]             # tasks, clients, selects, aggregates, optimisers, transforms alike
# rounds_a_run = 100
# rounds_a_day = 50
# tokens_a_day = 5_000_000
# clip = 1.0                        # the largest norm of an update that may leave
# metrics = ["train_loss", "loss", "tokens"]
"""


def known() -> dict[str, list[str]]:
    """Return what recipes can name, by kind: all that a site can allow."""
    return {kind: list(names) for kind, names in CATALOG.items()}


def own_recipe(asked: Mapping[str, Any], site_toml: Path) -> Recipe:
    """Return the recipe with this site as its only silo; where text and model lie is the site's to say."""
    site = read_site(site_toml, known())
    here = site_toml.absolute().parent
    model = site.models.get(asked.get("model", ""))
    own = {
        "silos": {site.name: text_of(site, site_toml)},
        "partition": None,
        "select": {"name": "everyone"},
        "runtime": "local",
        "threads": site.threads,
        "model": str(here / Path(model.path).expanduser()) if model and model.path else asked["model"],
    }
    recipe = read_recipe(asked).model_copy(update=own)
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(here)})})


def text_of(site: Site, site_toml: Path) -> SiloFiles:
    """Return where a site's text is: what it was started with, else what its file says."""
    said = site.data.model_dump(exclude_none=True)
    if started := os.environ.get(DATA):
        said["train"] = started
    if "train" not in said:
        raise FedllmError(f"{site_toml} says no [data] train; add it, or start with --data FILE.")
    return SiloFiles(**said)
