"""What a recipe lets a silo do in a round: its local training, and what of it stays there."""

from __future__ import annotations

from typing import Any

from fedllm.app import privacy
from fedllm.app.catalog import make
from fedllm.app.config import Recipe
from fedllm.app.ranks import Ranks
from fedllm.core.errors import FedllmError
from fedllm.core.types import Share, Tensors, Work
from fedllm.silo.dp_sgd import Guard
from fedllm.silo.keeping import keeping
from fedllm.silo.objective import Objective
from fedllm.silo.trainables import Trainable


def check_kept(recipe: Recipe, share: Share, own: Tensors) -> None:
    """Raise where what silos keep to themselves does not go with the rest of a recipe."""
    if own and recipe.algorithm["name"] != "averaging":
        raise FedllmError(
            f"algorithm '{recipe.algorithm['name']}' has no part that stays at a silo; set trainable.personal = 0, or "
            "learn with algorithm 'averaging'."
        )
    if own and share.name and not share.partial:
        raise FedllmError(
            f"share.name is '{recipe.share['name']}', whose silos train all that is sent, and trainable.personal is "
            "never sent; use share.name = 'everything' or trainable.personal = 0."
        )
    if share.partial and privacy.is_private(recipe):
        raise FedllmError(
            f"share.name is '{recipe.share['name']}', whose silos tell scores without noise; with noise use share.name "
            "= 'everything'."
        )


def make_work(
    recipe: Recipe,
    objective: Objective,
    tokenizer: Any,
    secret: bytes,
    ranks: Ranks | None,
    trainable: Trainable,
    first: Tensors,
    **changes: Any,
) -> Work:
    """Return a recipe's local training, with other settings where given.

    Where not all that is trained is sent, `first` is how all of it begins.
    """
    # A model behind an API has no tokenizer here, and nothing that is trained.
    pad = getattr(tokenizer, "pad_token_id", None) or 0
    if "steps" in changes:
        # Whoever says how many steps trains in one go, in which the learning rate runs its whole course.
        changes = {"rounds": 1, **changes}
    part = {key: value for key, value in {**recipe.client, **changes}.items() if value is not None}
    guard = Guard(secret, lambda records: privacy.record_noise(recipe, records))
    bound = [guard] if privacy.hides_records(recipe) else []
    plain: Work = make("client", part, objective, pad, *bound, rounds=recipe.rounds)
    if part.get("optimiser") == "muon" and trainable.adapter:
        raise FedllmError(
            f"client.optimiser 'muon' steps whole matrices of a model, and trainable '{trainable.name}' trains parts "
            "beside them; use 'adamw', or trainable.name = 'full'."
        )
    work = trainable.work(plain)
    if bound and work is not plain:
        raise FedllmError(
            f"trainable '{trainable.name}' trains an encoder beside what gets noise, so no record would be hidden; set "
            "trainable.encoder = 'shared', or trainable.name = 'prompt'."
        )
    if ranks:
        if work is not plain:
            raise FedllmError(
                f"processes is {recipe.processes} and trainable '{trainable.name}' trains through an encoder of its "
                "own, which is in one process; set processes = 1, or trainable.name = 'prompt'."
            )
        work = ranks.work(work, part, pad)
    return keeping(work, first) if first else work


def stays_text(share: Share, own: Tensors) -> str:
    """Say beside what is shared how much never leaves a silo."""
    count = sum(value.numel() for value in own.values())
    return "; ".join(filter(None, [share.name, f"{count:,} personal values stay at each silo" if own else ""]))
