"""What a recipe's `[secure]` becomes, and what does not go with it."""

from __future__ import annotations

from fedllm.app.config import Recipe, Secure
from fedllm.app.privacy import around, keeps_losses, sum_noise, sums_losses
from fedllm.app.sums import Wanted, require_packages
from fedllm.core.errors import FedllmError
from fedllm.core.types import Middleware
from fedllm.exchange.secure.settings import Circle, Settings, circle


def secure_part(wanted: Wanted) -> list[Middleware]:
    """Return the middleware of a recipe's `[secure]`, if it has one; refuse what shows more than the sum.

    A site knows only itself: with one silo nothing is said about their number.
    """
    recipe, noise = wanted.recipe, sum_noise(wanted.recipe)
    if recipe.secure is None:
        return []
    wanted.require_sums("[secure]")
    settings = settings_of(recipe.secure)
    if wanted.silos > 1:
        require_groups(settings, int(recipe.select.get("size", wanted.silos)))
    bound = wanted.norm_bound()
    require_packages("[secure]", "privacy", {"cryptography": "cryptography", "Crypto": "pycryptodome"})
    from fedllm.exchange.secure.middleware import secure_sum

    return [secure_sum(settings, wanted.secret, bound, wanted.like, wanted.weighted, noise, recipe.seed)]


def settings_of(table: Secure) -> Settings:
    """Return what a recipe's table says of the sum itself."""
    return Settings(**table.model_dump(exclude={"losses", "mean_loss"}))


def one_sum(recipe: Recipe) -> Recipe:
    """Return the recipe of one group's sum, where a recipe has groups: what the server sees of them."""
    if recipe.secure is None or recipe.secure.groups == 1:
        return recipe
    alone = recipe.secure.model_copy(update={"groups": 1})
    return recipe.model_copy(update={"secure": alone, "aggregate": {"name": "mean"}})


def require_groups(settings: Settings, silos: int) -> list[Circle]:
    """Return the circles of the smallest and the largest group of so many silos, or raise where one does not fit."""
    sizes = sorted({silos // settings.groups, -(-silos // settings.groups)})
    if settings.groups > 1 and sizes[0] < settings.least:
        raise FedllmError(
            f"secure.groups deals {silos} silos out to {settings.groups} groups, of which the smallest has {sizes[0]}, "
            f"and secure.least is {settings.least}; set secure.groups to {max(1, silos // settings.least)} or fewer."
        )
    return [circle(settings, size, size) for size in sizes]


def secure_lines(recipe: Recipe, silos: int) -> list[str]:
    """Say what a recipe's secure sum bears and what it does not hide."""
    if recipe.secure is None:
        return []
    size = int(around(recipe, silos, b"").expected) if recipe.select["name"] != "everyone" else silos
    size = max(size, recipe.secure.least)
    settings = settings_of(recipe.secure)
    now, *_ = each = require_groups(settings, size)
    sizes = " or ".join(str(one.silos) for one in each)
    many = "sums" if settings.groups == 1 else f"{settings.groups} groups, dealt anew each round, sums"
    return [
        f"secure       {many} of {sizes} silos, {now.neighbours} neighbours each: told with up to {now.drop_outs} "
        f"lost, hidden from the server with the help of {recipe.secure.colluding} of them ({now.threshold} shares of "
        f"{now.neighbours + 1} bring a key back); the server sees no sum of fewer than {now.silos - now.drop_outs}",
        "not summed   each silo's held-out loss and how many examples it has (a site's policy.metrics can keep them)"
        if recipe.secure.losses
        else "not told     any silo's held-out loss, or how many examples it has (secure.losses = true tells both)",
        *mean_lines(recipe),
    ]


def mean_lines(recipe: Recipe) -> list[str]:
    """Say what is told of the silos' held-out losses together, where that of none is."""
    if recipe.secure is None or not recipe.secure.mean_loss or not keeps_losses(recipe):
        return []
    if not sums_losses(recipe):
        return ["             nor the mean of their held-out losses, since it has no noise on it"]
    often = f" (every {recipe.evaluate.every} rounds)" if recipe.evaluate.every > 1 else ""
    return [
        f"in the sum   the silos' held-out losses on the weights that a round begins with{often}: their mean is told, "
        "where all in the sum add theirs (secure.mean_loss = false, or a site's policy.metrics without loss: none)"
    ]
