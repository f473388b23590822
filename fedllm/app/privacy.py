"""What a recipe does for privacy: how often it looks at text through which noise, and what it leaves open."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from fedllm.app.catalog import make
from fedllm.app.config import Recipe
from fedllm.core.errors import FedllmError
from fedllm.core.types import NOTHING, Tensors, Transform
from fedllm.exchange.accounting import Epsilons, Mechanism, epsilons, noise_for
from fedllm.exchange.ledger import Entry, Unit
from fedllm.exchange.secure.settings import SumNoise
from fedllm.exchange.server_noise import MARK, Around, require_sense
from fedllm.silo.dp_sgd import rate_of, slack

AT_SERVER = ("central_dp", "adaptive_dp", "banded_dp")
"""Transforms that add noise at the server."""

AT_SILO = ("local_dp",)

TOGETHER = ("distributed_dp",)
"""Transforms of whose noise each silo adds a part, in a secure sum."""

UNITS: dict[Unit, str] = {"silo": "a silo with all that it has", "record": "one record of a silo"}
"""What is hidden, as a sentence says it."""


class Use(NamedTuple):
    """One way in which a run looks at text through noise, once a round (tokenizer counts: before the first)."""

    what: str
    unit: Unit
    by: Literal["server", "silo", "silos together"]
    """Who adds the noise: if a silo does, it need not trust the server; if all do, it trusts that the others do."""
    silo: str
    """Whose text, or empty: of all alike."""
    mechanism: Mechanism
    """What one round costs a silo that takes part."""
    every: int = 1
    """Rounds from one turn of a silo to its next, where they take turns."""


def noisy(recipe: Recipe) -> Mapping[str, Any] | None:
    """Return the transform that adds noise, if the recipe has one."""
    found = [part for part in recipe.transforms if part.get("name") in (*AT_SERVER, *AT_SILO, *TOGETHER)]
    if len(found) > 1:
        raise FedllmError(
            f"transforms: '{found[1]['name']}' adds noise a second time; keep one transform that adds noise."
        )
    return found[0] if found else None


def is_private(recipe: Recipe) -> bool:
    """Say whether a recipe adds noise anywhere."""
    return noisy(recipe) is not None or hides_records(recipe)


def has_secret(recipe: Recipe) -> bool:
    """Say whether a run draws on a secret that outlives a kill: for noise, or for keys."""
    return is_private(recipe) or adds_up(recipe)


def adds_up(recipe: Recipe) -> bool:
    """Say whether the server gets one sum in place of the silos' updates."""
    return recipe.secure is not None or recipe.homomorphic is not None


def keeps_losses(recipe: Recipe) -> bool:
    """Say whether no silo tells its held-out loss or how many examples it has."""
    return recipe.secure is not None and not recipe.secure.losses


def sums_losses(recipe: Recipe) -> bool:
    """Say whether the silos' held-out losses are told in a sum alone; with noise they are not, having none on them."""
    asked = recipe.secure is not None and recipe.secure.mean_loss
    return asked and keeps_losses(recipe) and not is_private(recipe)


def hides_records(recipe: Recipe) -> bool:
    """Say whether the silos train with noise on every step."""
    return bool(recipe.client.get("name") == "dp_sgd")


def in_sum(recipe: Recipe) -> bool:
    """Say whether the silos add noise together that hides records."""
    return hides_records(recipe) and recipe.client.get("noise_in") == "sum"


def sum_noise(recipe: Recipe) -> SumNoise | None:
    """Return the noise that the silos add together in a secure sum, if the recipe has any.

    Raises:
        FedllmError: where it says it twice, or has no secure sum.
    """
    part, records = noisy(recipe), in_sum(recipe)
    together = part is not None and part["name"] in TOGETHER
    if not (together or records):
        return None
    what = "client.noise_in is 'sum'" if records else "transforms: 'distributed_dp'"
    if recipe.secure is None:
        raise FedllmError(
            f"{what}: each silo adds only its part of the noise, which hides nothing unless the server sees only the "
            "sum; add [secure], or let each silo add all of it (client.noise_in = 'silo', or 'local_dp')."
        )
    if part is not None and records:
        raise FedllmError(f"{what}, and '{part['name']}' adds noise a second time; keep one of them.")
    if part is not None:
        require_sense("distributed_dp", part["max_norm"], part.get("noise"))
        return SumNoise(float(part["noise"]), float(part["max_norm"]) * slack(1.0))
    client, size = recipe.client, int(recipe.client.get("batch_size", 32))
    if client.get("noise") is None:
        record_noise(recipe, 1)
        raise FedllmError(
            "client.noise_in is 'sum', and a site does not know how many records others have; say client.noise."
        )
    unit = float(client.get("learning_rate", 1e-3)) * float(client["clip"]) / size
    return SumNoise(float(client["noise"]), unit * slack(float(size)))


def trusts_nobody(recipe: Recipe) -> bool:
    """Say whether each silo's update has its own noise, so that nothing else may leave without any."""
    part = noisy(recipe)
    return part is not None and part["name"] in AT_SILO


def record_noise(recipe: Recipe, records: int) -> float:
    """Return the noise multiplier of a silo with so many records: what the recipe says or its target asks for."""
    said, target = recipe.client.get("noise"), recipe.privacy.target_epsilon
    if said is not None:
        return float(said)
    if target is None:
        raise FedllmError(
            "client.noise is missing; set it (standard deviation over clip, such as 1.0), or set "
            "privacy.target_epsilon and it is solved for."
        )
    return solved(target, recipe.privacy.delta, record_steps(recipe, records, 1.0), recipe.rounds)


@lru_cache(maxsize=4096)
def solved(target: float, delta: float, once: Mechanism, rounds: int) -> float:
    """Return the noise with which so many rounds of a mechanism reach a target."""
    return noise_for(target, delta, lambda multiplier: [planned(once._replace(multiplier=multiplier), rounds)])


def record_steps(recipe: Recipe, records: int, multiplier: float) -> Mechanism:
    """Return what a round's steps do with a silo of so many records."""
    part = recipe.client
    rate = rate_of(part.get("rate"), int(part.get("batch_size", 32)), records)
    drawn: Literal["none", "poisson"] = "poisson" if rate < 1 else "none"
    return Mechanism(multiplier, drawn, rate=rate, times=int(part.get("steps", 10)))


def around(recipe: Recipe, silos: int, secret: bytes) -> Around:
    """Return what noise at the server needs to know, and refuse selections whose rounds it cannot account for."""
    select = recipe.select
    name = select.get("name")
    expected = {
        "everyone": float(silos),
        "fixed_size": float(select.get("size") or 0),
        "poisson": silos * float(select.get("rate") or 0),
        # Of silos that do not divide by the cycle some rounds have one more: the same number holds for all of them.
        "cyclic": float(silos // max(1, int(select.get("every") or 1))),
    }
    if name not in expected:
        raise FedllmError(
            f"select.name is '{name}', of which no epsilon is known; with noise use everyone, cyclic, fixed_size or "
            "poisson."
        )
    if not expected[name] > 0:
        raise FedllmError(f"select '{name}' lacks its size or rate; set it.")
    part = noisy(recipe)
    if part and part["name"] == "banded_dp" and name not in ("everyone", "cyclic"):
        raise FedllmError(
            f"transforms: 'banded_dp' is for silos that take turns, and select.name is '{name}'; use cyclic, or "
            "'central_dp', whose noise is less where silos are drawn by chance."
        )
    if part and part["name"] == "banded_dp" and recipe.share.get("name") != "everything":
        raise FedllmError("transforms: 'banded_dp' needs all parameters in every round; set share = 'everything'.")
    return Around(secret, expected[name], int(select["every"]) if name == "cyclic" else 1)


def transforms(recipe: Recipe, silos: int, secret: bytes) -> list[Transform]:
    """Make a recipe's transforms; those that add noise are told what it takes."""
    made = list[Transform]()
    for part in recipe.transforms:
        name, bound = part.get("name"), list[Any]()
        if name in (*AT_SERVER, *TOGETHER):
            bound = [around(recipe, silos, secret)]
        if name in AT_SILO:
            bound = [secret]
        made.append(make("transforms", part, *bound, seed=recipe.seed))
    return made


def sampled(recipe: Recipe, silos: int, multiplier: float) -> Mechanism:
    """Return one round's noise at the server with how its silos are drawn."""
    select = recipe.select
    if select["name"] == "poisson" and select["rate"] < 1:
        return Mechanism(multiplier, "poisson", rate=float(select["rate"]))
    if select["name"] == "fixed_size" and select["size"] < silos:
        return Mechanism(multiplier, "fixed", size=int(select["size"]), of=silos)
    return Mechanism(multiplier)


def uses(recipe: Recipe, silos: int, examples: Mapping[str, int] = NOTHING) -> list[Use]:
    """Return all the ways in which the rounds of a recipe look at text through noise.

    `examples` are those that each silo learns from; without them there is one use for all silos alike.
    """
    found, part = list[Use](), noisy(recipe)
    if part and part["name"] in AT_SERVER:
        what = "training and clipping statistic" if part["name"] == "adaptive_dp" else "training"
        found.append(Use(what, "silo", "server", "", sampled(recipe, silos, float(part["noise"])), turns(recipe)))
    if part and part["name"] in (*AT_SILO, *TOGETHER):
        by: Literal["silo", "silos together"] = "silo" if part["name"] in AT_SILO else "silos together"
        found.append(Use("training", "silo", by, "", Mechanism(float(part["noise"])), turns(recipe)))
    if hides_records(recipe):
        if not examples and recipe.client.get("rate") is not None:
            examples = {"": 1}
        found += [
            Use(
                "training",
                "record",
                "silos together" if in_sum(recipe) else "silo",
                name,
                record_steps(recipe, count, record_noise(recipe, count)),
                turns(recipe),
            )
            for name, count in examples.items()
        ]
    return found


def turns(recipe: Recipe) -> int:
    """Return the rounds from one turn of a silo to its next."""
    return int(recipe.select["every"]) if recipe.select["name"] == "cyclic" else 1


def resolved(recipe: Recipe, silos: int, examples: Mapping[str, int] = NOTHING) -> Recipe:
    """Return the recipe with the noise that its `privacy.target_epsilon` asks for, where it says none.

    Noise that the silos add together is the same for all: that of the silo which needs most.

    Raises:
        FedllmError: where the noise that it says does not reach the target, or a target has no noise to set.
    """
    target, part = recipe.privacy.target_epsilon, noisy(recipe)
    if part and part.get("noise") is None and target is not None:
        around(recipe, silos, b"")

        def whole(multiplier: float) -> list[Mechanism]:
            return by_silo(uses(with_noise(recipe, multiplier), silos), "silo", recipe.rounds)[0]

        recipe = with_noise(recipe, noise_for(target, recipe.privacy.delta, whole))
    if in_sum(recipe) and recipe.client.get("noise") is None and target is not None:
        fewest = min(examples.values(), default=1)
        if not examples and recipe.client.get("rate") is None:
            raise FedllmError(
                "client.noise_in is 'sum' and nobody knows yet how many records the sites have, so the noise cannot be "
                "solved for; say client.noise, or client.rate."
            )
        recipe = recipe.model_copy(update={"client": {**recipe.client, "noise": record_noise(recipe, fewest)}})
    counted = bool(recipe.scratch and recipe.scratch.noise)
    if target is not None and counted and hides_records(recipe) and recipe.client.get("noise") is None:
        raise FedllmError(
            "privacy.target_epsilon does not know yet how often the tokenizer looks at the text; say client.noise, or "
            "set scratch.tokenizer to the tokenizer of a model."
        )
    limits = {"target_epsilon": target, "stop_at_epsilon": recipe.privacy.stop_at_epsilon}
    for key, limit in limits.items():
        if limit is not None and not is_private(recipe):
            raise FedllmError(
                f"privacy.{key} is {limit:g}, but nothing in the recipe clips and adds noise; add [[transforms]] name "
                "= 'central_dp', or drop it."
            )
    return recipe


def require_target(recipe: Recipe, silos: int, examples: Mapping[str, int]) -> None:
    """Raise where the noise that a recipe says is not enough for the epsilon that it says."""
    target = recipe.privacy.target_epsilon
    if target is None:
        return
    for unit, found in planned_epsilons(recipe, silos, examples).items():
        if found.best > target:
            raise FedllmError(
                f"The recipe's noise gives epsilon {found.best:.3g} of {UNITS[unit]} after {recipe.rounds} rounds and "
                f"privacy.target_epsilon is {target:g}; leave out 'noise' and it is solved for, or raise the target."
            )


def with_noise(recipe: Recipe, multiplier: float) -> Recipe:
    """Return the recipe with this noise in its transform."""
    names = (*AT_SERVER, *AT_SILO, *TOGETHER)
    parts = [{**part, "noise": multiplier} if part.get("name") in names else part for part in recipe.transforms]
    return recipe.model_copy(update={"transforms": parts})


def tokenizer_entries(recipe: Recipe, looks: Mapping[str, int]) -> list[Entry]:
    """Return what the ledger notes of a tokenizer for which silos told noised counts so many times each."""
    noise = recipe.scratch.noise if recipe.scratch else 0.0
    counted = [(name, Mechanism(noise, times=times)) for name, times in looks.items() if noise]
    return [Entry(0, "tokenizer counts", "record", name, "", mechanism) for name, mechanism in counted]


def planned(mechanism: Mechanism, rounds: int) -> Mechanism:
    """Return what so many rounds cost."""
    return mechanism._replace(times=mechanism.times * rounds)


def planned_epsilons(recipe: Recipe, silos: int, examples: Mapping[str, int] = NOTHING) -> dict[Unit, Epsilons]:
    """Return what a whole run spends by plan: of the silo that it costs most, if it takes part in every round."""
    found = uses(recipe, silos, examples)
    units = dict.fromkeys(use.unit for use in found)
    return {unit: worst(by_silo(found, unit, recipe.rounds), recipe.privacy.delta) for unit in units}


def by_silo(found: Sequence[Use], unit: Unit, rounds: int) -> list[list[Mechanism]]:
    """Return what so many rounds do with each silo's text."""
    own = [use for use in found if use.unit == unit]
    names = dict.fromkeys(use.silo for use in own if use.silo) or {"": None}
    return [
        [planned(use.mechanism, math.ceil(rounds / use.every)) for use in own if use.silo in ("", name)]
        for name in names
    ]


def worst(each: Sequence[Sequence[Mechanism]], delta: float) -> Epsilons:
    """Return the largest of several epsilons."""
    return max((epsilons(mechanisms, delta) for mechanisms in each), key=lambda found: found.best)


def said(found: Sequence[Use]) -> list[str]:
    """Say what a round does and to whom, one line for all silos that do alike."""
    whose: dict[str, list[str]] = {}
    for use in found:
        whose.setdefault(f"{use.what}{{}}: {noise_text(use.mechanism)}, added by the {use.by}", []).append(use.silo)
    return [text.format(f" at {', '.join(silos)}" if all(silos) else "") for text, silos in whose.items()]


def noise_text(mechanism: Mechanism) -> str:
    """Say how noise is drawn and of whom."""
    drawn = {
        "none": "",
        "poisson": f" on a Poisson sample at rate {mechanism.rate:.3g}",
        "fixed": f" on {mechanism.size} drawn of {mechanism.of}",
    }[mechanism.sampling]
    times = f", {mechanism.times} times a round" if mechanism.times > 1 else ""
    return f"{mechanism.noise.capitalize()} noise of {mechanism.multiplier:.4g} x the clip bound{drawn}{times}"


def entries(
    recipe: Recipe, silos: int, examples: Mapping[str, int], asked: Sequence[str], number: int, mark: str
) -> list[Entry]:
    """Return what the ledger notes of round `number`, counted from 1.

    Without a mark that is what the silos' own noise costs, to be noted before they are asked; with it what the
    server's does, to be noted before its result is seen.
    """
    found = list[Entry]()
    for use in uses(recipe, silos, examples):
        if (use.by == "server") != bool(mark):
            continue
        # Silos that take turns: each group has spent what was done in its own rounds, and nothing in the others'.
        turn = f"turn {1 + (number - 1) % use.every} of {use.every}" if use.every > 1 else ""
        whose = [turn] if use.by == "server" else [name for name in asked if use.silo in ("", name)]
        found += [Entry(number, use.what, use.unit, name, mark, use.mechanism) for name in whose]
    return found


def mark_of(memory: Tensors) -> str:
    """Return the mark of the server's last noise from what its transforms remember."""
    marks = [value for name, value in memory.items() if name.endswith(f"/{MARK}")]
    return bytes(marks[0].tolist()).hex() if marks else ""


def open_ends(recipe: Recipe) -> list[str]:
    """Return what a run tells of its text without noise, so that no epsilon covers it."""
    found = [] if keeps_losses(recipe) else ["each silo's held-out loss, size and names of its groups of text"]
    if recipe.evaluate.alone:
        found.append("what each silo reaches alone (evaluate.alone)")
    if recipe.evaluate.pooled:
        found.append("what training on everything reaches (evaluate.pooled)")
    if recipe.scratch and recipe.scratch.tokenizer == "federated":
        if not recipe.scratch.noise:
            found.append("the counts from which the tokenizer was learned (scratch.noise is not set)")
        elif not hides_records(recipe):
            found.append("of a silo, the counts from which the tokenizer was learned: their noise hides a record")
    part = noisy(recipe)
    if adds_up(recipe) and (part is None or part["name"] not in AT_SILO):
        found.append("to the server when each silo took part")
    elif part and part["name"] in AT_SERVER:
        found.append("to the server each silo's update, number of examples, training loss and when it took part")
    return found
