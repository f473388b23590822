"""A site's own view of a recipe that came over the wire: its text, its model folder, its threads."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.app.catalog import CATALOG, SERVER_FILES
from fedllm.app.config import Recipe, SiloFiles, Without, read_recipe
from fedllm.app.privacy import AT_SERVER
from fedllm.core.errors import FedllmError
from fedllm.federation.site.policy import Site, read_site

DATA = "FEDLLM_DATA"
"""The environment variable by which `fedllm site start --data` reaches the worker."""


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
        "threads": site.threads or asked.get("threads"),
        "processes": site.processes,
        "model": str(here / Path(model.path).expanduser()) if model and model.path else asked["model"],
    }
    recipe = read_recipe(asked).model_copy(update=own)
    # The other silos are none of its matters, and who is left out is not asked.
    rows = {name: keys for name, keys in recipe.without.rows.items() if name == site.name}
    recipe = recipe.model_copy(update={"without": Without(rows=rows)})
    if recipe.secure and "loss" not in site.policy.metrics:
        # What is masked cannot be taken out of a reply.
        recipe = recipe.model_copy(update={"secure": recipe.secure.model_copy(update={"mean_loss": False})})
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
        raise FedllmError(f"{site_toml} says no [data] train; add it, or name it with --data FILE.")
    return SiloFiles(**said)
