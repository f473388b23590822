"""What does not go together in a recipe, as far as the recipe alone shows it."""

from __future__ import annotations

from fedllm.app import privacy
from fedllm.app.config import Recipe
from fedllm.app.sums import require_packages
from fedllm.app.without import check_without
from fedllm.core.errors import FedllmError


def check_together(recipe: Recipe, elsewhere: bool) -> None:
    """Raise where parts of a recipe contradict one another; `elsewhere`: where its silos are other machines."""
    private = privacy.is_private(recipe)
    if recipe.duplicates and private:
        raise FedllmError(
            "[duplicates] lets hashes of texts leave without noise, so no epsilon would be true; take the table out, "
            "or drop duplicates inside each silo by [[cleaning]]."
        )
    check_without(recipe)
    if recipe.canaries and elsewhere:
        raise FedllmError(
            "[canaries] are planted and looked for on one machine, and no site plants any for a server; take the table "
            "out, and rehearse the recipe with `fedllm run` where you want it audited."
        )
    if recipe.availability and elsewhere:
        raise FedllmError(
            "[availability] makes silos of one machine late or slow, and real sites are so by themselves; take the "
            "table out of the recipe, or try it with `fedllm run`."
        )
    if recipe.evaluate.alone and private and elsewhere:
        raise FedllmError(
            "evaluate.alone lets every site tell what it reaches alone, without noise; with noise set it to false."
        )
    if private and recipe.algorithm["name"] != "averaging":
        raise FedllmError(
            f"algorithm '{recipe.algorithm['name']}' has no noise that could be accounted; take the transform that "
            "adds noise out of the recipe, or learn with algorithm 'averaging'."
        )
    if recipe.homomorphic and not elsewhere:
        # A server adds ciphertexts up without it.
        require_packages("[homomorphic]", "homomorphic", {"tenseal": "tenseal"})
    if recipe.evaluate.pooled and privacy.keeps_losses(recipe):
        raise FedllmError(
            "evaluate.pooled is held against each silo's held-out loss, and with [secure] none is told; set "
            "evaluate.pooled = false, or secure.losses = true."
        )
    if privacy.hides_records(recipe) and privacy.keeps_losses(recipe) and elsewhere and "rate" not in recipe.client:
        raise FedllmError(
            "client.rate is not set, so the ledger needs to know how many examples each site has, and with [secure] "
            "none tells it; set client.rate, or secure.losses = true."
        )
    if recipe.secure and recipe.homomorphic:
        raise FedllmError(
            "[secure] and [homomorphic] both add updates up unseen; keep one of them: [secure], unless silos cannot "
            "take part in its four messages a round."
        )
    for table in ("secure", "homomorphic"):
        if getattr(recipe, table) and recipe.algorithm["name"] != "averaging":
            raise FedllmError(
                f"[{table}] hides updates in their sum, and algorithm '{recipe.algorithm['name']}' asks each silo for "
                f"its own; take [{table}] out, or learn with algorithm 'averaging'."
            )
