"""What a recipe leaves out and keeps for that, where it does not go with the rest."""

from __future__ import annotations

from fedllm.app import privacy
from fedllm.app.config import Recipe
from fedllm.core.errors import FedllmError
from fedllm.core.types import Middleware
from fedllm.exchange.calibrate import calibrate, record_norms


def by_record(recipe: Recipe) -> list[Middleware]:
    """Return what records the norms of updates, and what scales updates to recorded ones, if a recipe asks for it.

    Raises `FedllmError` where the recipe has a part with which neither works.
    """
    key = "keep.norms" if recipe.keep.norms else "without.norms" if recipe.without.norms else ""
    if key and recipe.transforms:
        raise FedllmError(
            f"{key} is about updates as they are, and transforms has '{recipe.transforms[0].get('name')}'; take "
            "[[transforms]] out, or forget by exact replay, which needs no record."
        )
    noting = [record_norms()] if recipe.keep.norms else []
    return [*noting, *([calibrate(recipe.without.norms)] if recipe.without.norms else [])]


def check_without(recipe: Recipe) -> None:
    """Raise where something is left out or kept that does not go with the rest of a recipe."""
    if recipe.without.silos and privacy.is_private(recipe):
        raise FedllmError(
            "without.silos keeps the draws of a run with more silos, for which this noise was not made; take the silo "
            "out of [silos] instead."
        )
    if recipe.keep.norms and recipe.algorithm["name"] != "averaging":
        raise FedllmError(
            f"keep.norms is about updates, which algorithm '{recipe.algorithm['name']}' has none of; take it out."
        )
