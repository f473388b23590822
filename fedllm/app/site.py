"""A site's own view of a recipe that came over the wire: its text, its model folder, its threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.app.catalog import CATALOG, SERVER_FILES
from fedllm.app.config import Recipe, SiloFiles, read_recipe
from fedllm.app.privacy import AT_SERVER
from fedllm.core.errors import FedllmError
from fedllm.federation.policy import Site, read_site

DATA = "FEDLLM_DATA"
"""The environment variable by which `fedllm site start --data` reaches the worker."""

TEMPLATE = """\
# This file belongs to the site. Nothing is done here that it does not allow.
name = "{name}"
# threads = 2                       # processor threads of training; all of them if nothing is said
# processes = 2                     # processes that share the model that is trained here; on GPUs one each

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
# epsilon = 8.0                     # what all runs together may spend of this text, over the life of `state`
# delta = 1e-5                      # at which epsilon is reckoned
# trust_server = false              # whether noise that only the server adds counts
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
    algorithm = {key: "" if key in SERVER_FILES else value for key, value in asked.get("algorithm", {}).items()}
    own = {
        "algorithm": algorithm or {"name": "averaging"},
        "silos": {site.name: text_of(site, site_toml)},
        "partition": None,
        # A site plants nothing among its rows for a server.
        "canaries": None,
        "select": {"name": "everyone"},
        "transforms": [here_of(part) for part in asked.get("transforms", [])],
        "runtime": "local",
        "threads": site.threads,
        "processes": site.processes,
        "model": str(here / Path(model.path).expanduser()) if model and model.path else asked["model"],
    }
    recipe = read_recipe(asked).model_copy(update=own)
    if recipe.endpoint:
        # Where its text goes is the site's to say, whatever the recipe says.
        url = model.url if model else None
        if not url:
            raise FedllmError(f'{site_toml} names no API: add "endpoint" = {{ url = "https://..." }} under [models].')
        own_endpoint = recipe.endpoint.model_copy(update={"url": url, "key_env": model.key_env if model else None})
        recipe = recipe.model_copy(update={"endpoint": own_endpoint})
    return recipe.model_copy(update={"data": recipe.data.model_copy(update={"root": str(here)})})


def here_of(part: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return a site's half of a transform: where the server adds the noise that is the clip, or nothing."""
    if part.get("name") in AT_SERVER:
        bound = 1e30 if part["name"] == "adaptive_dp" else part["max_norm"]
        return {"name": "clip", "max_norm": bound}
    return part


def text_of(site: Site, site_toml: Path) -> SiloFiles:
    """Return where a site's text is: what it was started with, else what its file says."""
    said = site.data.model_dump(exclude_none=True)
    if started := os.environ.get(DATA):
        said["train"] = started
    if "train" not in said:
        raise FedllmError(f"{site_toml} says no [data] train; add it, or start with --data FILE.")
    return SiloFiles(**said)
