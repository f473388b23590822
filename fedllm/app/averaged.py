"""From a recipe's tables to who is asked, and to local training and an average."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from fedllm.app import privacy
from fedllm.app.catalog import make
from fedllm.app.config import Recipe
from fedllm.app.homomorphic import homomorphic_part
from fedllm.app.secure import secure_part
from fedllm.app.sums import Wanted
from fedllm.app.without import by_record
from fedllm.app.work import stays_text
from fedllm.core.noise import key_of
from fedllm.core.round import averaging, parts_of
from fedllm.core.seeds import derive
from fedllm.core.types import Algorithm, Client, Middleware, Select, Share, Tensors, Work, on_meta
from fedllm.exchange.availability import Presence, availability
from fedllm.exchange.local_dp import nothing_else
from fedllm.exchange.looking import looking
from fedllm.exchange.lora_error import lora_error


def selection(recipe: Recipe, names: Sequence[str], secret: bytes) -> Select:
    """Return who of the silos is asked in each round; who is left out is drawn and not asked, so turns stay."""
    # Who knows when a silo is asked has no use for chance, so with noise the choice is as secret as the noise.
    seed = derive(int.from_bytes(key_of(secret, "select")[:7]), "silos") if privacy.is_private(recipe) else recipe.seed
    drawn: Select = make("select", recipe.select, list(names), seed=seed)
    gone = set(recipe.without.silos)
    return (lambda number: [name for name in drawn(number) if name not in gone]) if gone else drawn


def averaged(
    recipe: Recipe,
    work: Work,
    evaluator: Client,
    select: Select,
    share: Share,
    params: Tensors,
    own: Tensors,
    silos: int,
    secret: bytes,
    key: bytes | None,
    there: Mapping[str, Presence],
) -> Algorithm:
    """Return a recipe's local training and average; `own` never leaves a silo, `key` is the silos' alone."""
    if privacy.trusts_nobody(recipe):
        work = nothing_else(work)
    if privacy.sums_losses(recipe):
        work = looking(work, evaluator, recipe.evaluate.every)
    transforms = privacy.transforms(recipe, silos, secret)
    # What a probe tells has no noise on it, and behind a sum there is nothing to look at.
    factors = not (privacy.is_private(recipe) or privacy.adds_up(recipe)) and any(
        ".lora_A." in name and value.dim() == 2
        for part in parts_of(share, on_meta(params))
        for name, value in part.items()
    )
    wanted = Wanted(recipe, work, share, transforms, params, silos, secret, key)
    middleware = [*summing(wanted), *by_record(recipe)]
    if there:
        middleware.append(availability(there, derive(recipe.seed, "availability")))
    return averaging(
        work=work,
        select=select,
        aggregate=make("aggregate", recipe.aggregate),
        optimiser=make("optimiser", recipe.optimiser, rounds=recipe.rounds),
        share=share._replace(name=stays_text(share, own)),
        transforms=transforms,
        middleware=middleware,
        probes=[lora_error(str(recipe.aggregate.get("weights", "examples")))] if factors else [],
    )


def summing(wanted: Wanted) -> list[Middleware]:
    """Return what lets the server see sums in place of the silos' updates, if a recipe asks for it."""
    return [*secure_part(wanted), *homomorphic_part(wanted)]
