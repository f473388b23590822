"""What a recipe's `[homomorphic]` becomes, whose key it takes, and what the plan says of it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator

from fedllm.app.config import Recipe
from fedllm.app.sums import Wanted, require_packages
from fedllm.app.terminal import amount
from fedllm.core.errors import FedllmError
from fedllm.core.noise import key_of
from fedllm.core.plan import size
from fedllm.core.types import Middleware, Tensors
from fedllm.exchange.homomorphic.settings import OPENERS, Settings, hidden


def homomorphic_part(wanted: Wanted) -> list[Middleware]:
    """Return the middleware of a recipe's `[homomorphic]`, if it has one; refuse what shows more than it says.

    Without a key of the silos one is made of the secret: on one machine it is all silos', at a server nobody's.
    """
    recipe = wanted.recipe
    if recipe.homomorphic is None:
        return []
    wanted.require_sums("[homomorphic]")
    settings = settings_of(recipe)
    each = int(recipe.select.get("size", wanted.silos))
    if wanted.silos > 1 and each < settings.least:
        raise FedllmError(
            f"[homomorphic]: {each} silos are asked in a round and homomorphic.least is {settings.least}; a sum of "
            "fewer would tell too much of each."
        )
    require_packages("[homomorphic]", "homomorphic", {"cryptography": "cryptography"})
    from fedllm.exchange.homomorphic.middleware import homomorphic_sum

    bound, key = wanted.norm_bound(), wanted.key or key_of(wanted.secret, "homomorphic key")
    return [
        homomorphic_sum(settings, key, wanted.secret, bound, wanted.like, wanted.weighted, wanted.share.period),
    ]


def settings_of(recipe: Recipe) -> Settings:
    """Return the settings in a recipe's `[homomorphic]`."""
    assert recipe.homomorphic is not None
    return Settings(**recipe.homomorphic.model_dump(exclude={"key"}))


def key_from(variable: str) -> bytes:
    """Return the key that the silos share and the server does not know, from the node's environment."""
    said = os.environ.get(variable, "").strip()
    if not re.fullmatch("[0-9a-fA-F]{64}", said):
        raise FedllmError(
            f"The environment variable {variable} has no key of 64 hexadecimal digits; let the silos agree on one, "
            "such as from `openssl rand -hex 32`, and keep it from the server."
        )
    return bytes.fromhex(said)


def homomorphic_lines(recipe: Recipe, update: Tensors, sent: int, away: bool) -> Iterator[str]:
    """Say what a recipe's homomorphic sum hides from whom, of such an `update`; `sent` bytes go up."""
    if recipe.homomorphic is None:
        return
    names = hidden(settings_of(recipe), update)
    inside, plain = sum(update[name].numel() for name in names), size(update.values())
    yield (
        f"homomorphic  {len(names)} of {len(update)} tensors are encrypted ({inside:,} of "
        f"{sum(value.numel() for value in update.values()):,} values): {amount(sent)} up in place of {amount(plain)}; "
        f"{OPENERS} silos open each sum"
    )
    whose = f"the sites' own, in {recipe.homomorphic.key}" if away else "made by this run, for all its silos"
    yield f"             one key ({whose}) opens every update: a single silo that shows it to the server undoes it all"
    yield "not summed   each silo's held-out loss and how many examples it has (a site's policy.metrics can keep them)"
