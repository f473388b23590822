"""What a site's policy says to a recipe, rule by rule, before any of its text is touched."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import fedllm
from fedllm.core.errors import FedllmError, Refused, nearest
from fedllm.federation.site.policy import KINDS, Known, Policy, Site

KEEPS_NORM = {"cast"}
"""Transforms after which a clipped update is still clipped; what adds or scales values undoes it."""

CLIPS = {"clip", "central_dp", "banded_dp", "local_dp", "distributed_dp"}
"""Transforms that clip what a site's text has done before it leaves, at their `max_norm`."""

SERVER_NOISE = {"central_dp", "adaptive_dp", "banded_dp"}
SITE_NOISE = {"local_dp", "dp_sgd"}
SUM_NOISE = {"distributed_dp"}
"""Transforms of whose noise each site adds a part."""

SAID = ("recipe", "algorithm", "fedllm", "model_sha256", "user")
"""What a server says when it asks for a run."""

LONGEST = 200
"""Characters of a name or version that a peer may send."""


class Asked(NamedTuple):
    """The facts of a run that policies speak of."""

    recipe: str
    """SHA-256 of the recipe's canonical JSON."""
    model: str
    model_sha256: str
    rounds: int
    names: Mapping[str, Sequence[str]]
    """By rule (`trainables`...): what the recipe names of that kind."""
    clip: float | None
    """The largest norm that an update has when it leaves, if it has one."""
    alone: bool
    """Whether each site is to train alone, for comparison."""
    user: str
    fedllm: str
    compares: bool = False
    """Whether salted hashes of the texts are to leave, to find those that several sites have."""
    secure: bool = False
    """Whether the server sees only sums of updates."""
    noise_in_sum: bool = False
    """Whether a site that trains with noise adds only its part of it."""


class Spending(NamedTuple):
    """A site's accountant."""

    after: Callable[[Mapping[str, Any], str], tuple[float, float]]
    """From a recipe and a run's name to epsilon over the site's life without that run and with all of it."""
    note: Callable[[Mapping[str, Any], str, int], None]
    """Notes what a round of a run spends, before its work is begun."""


class Refusal(NamedTuple):
    """A rule that says no, and a sentence that says what the site allows."""

    rule: str
    sentence: str


class Denied(Exception):
    """The site says no; carries the refusal."""

    def __init__(self, rule: str, sentence: str) -> None:
        super().__init__(sentence)
        self.refusal = Refusal(rule, sentence)


def canonical(value: Any) -> bytes:
    """Return JSON with its keys sorted and no spaces, the same bytes for the same value.

    >>> canonical({"b": 1, "a": [2.0]})
    b'{"a":[2.0],"b":1}'
    """
    return json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False).encode()


def recipe_sha256(recipe: Mapping[str, Any]) -> str:
    """Return the hash by which a site allows a recipe."""
    return hashlib.sha256(canonical(recipe)).hexdigest()


def facts(said: Mapping[str, Any]) -> Asked:
    """Take the facts out of what a server asks, the keys `SAID`, or raise `Refused`; nothing of it is trusted."""
    recipe, algorithm = said.get("recipe"), said.get("algorithm")
    if not isinstance(recipe, dict):
        raise Refused("the recipe is not an object")
    rounds = recipe.get("rounds")
    if not isinstance(rounds, int) or isinstance(rounds, bool) or rounds < 0:
        raise Refused(f"the recipe's 'rounds' is {rounds!r:.50}, not a whole number")
    transforms = recipe.get("transforms")
    if not isinstance(transforms, list) or not isinstance(algorithm, list):
        raise Refused("the recipe's 'transforms' or the names of the algorithm's parts are not a list")
    try:
        sha256 = recipe_sha256(recipe)
    except (ValueError, RecursionError) as error:
        raise Refused(f"the recipe has no canonical JSON ({type(error).__name__})") from error
    names = {rule: (part_name(recipe, kind),) for rule, kind in KINDS.items() if rule != "transforms"}
    return Asked(
        recipe=sha256,
        model=text(recipe, "model"),
        model_sha256=text(said, "model_sha256"),
        rounds=rounds,
        names={
            "algorithms": tuple(text({"algorithm": name}, "algorithm") for name in algorithm),
            **names,
            "transforms": tuple(part_name({"transforms": part}, "transforms") for part in transforms),
        },
        clip=clipped_at(transforms),
        alone=not isinstance(recipe.get("evaluate"), dict) or recipe["evaluate"].get("alone") is not False,
        user=text(said, "user"),
        fedllm=text(said, "fedllm"),
        compares=recipe.get("duplicates") is not None,
        secure=isinstance(recipe.get("secure"), dict),
        noise_in_sum=recipe["client"].get("noise_in", "silo") != "silo",
    )


def text(table: Mapping[str, Any], key: str) -> str:
    """Return a short string of a table, or raise `Refused`."""
    value = table.get(key)
    if not isinstance(value, str) or len(value) > LONGEST:
        raise Refused(f"'{key}' is not a string of at most {LONGEST} characters")
    return value


def part_name(recipe: Mapping[str, Any], kind: str) -> str:
    """Return the name of one of a recipe's parts, or raise `Refused`."""
    part = recipe.get(kind)
    if not isinstance(part, dict):
        raise Refused(f"the recipe's '{kind}' is not a table with a name")
    return text(part, "name")


def clipped_at(transforms: Sequence[Mapping[str, Any]]) -> float | None:
    """Return the largest norm of an update after these transforms, if they bound it.

    >>> clipped_at([{"name": "clip", "max_norm": 1.0}, {"name": "cast"}])
    1.0
    >>> clipped_at([{"name": "clip", "max_norm": 1.0}, {"name": "top_k", "fraction": 0.1}])
    """
    bound = math.inf
    for part in transforms:
        if part.get("name") in CLIPS:
            norm = part.get("max_norm")
            if not isinstance(norm, (int, float)) or isinstance(norm, bool) or not 0 < norm < 1e300:
                raise Refused(f"the recipe clips at {norm!r:.50}, which is not a norm")
            bound = min(bound, float(norm))
        elif part.get("name") not in KEEPS_NORM:
            bound = math.inf
    return None if bound == math.inf else bound


def nobody(*asked: Any) -> Any:
    """Reckon nothing."""
    raise FedllmError("it has no accountant; start it with `fedllm site start`.")


NOBODY = Spending(nobody, nobody)


def by_epsilon(site: Site, asked: Mapping[str, Any], run: str, spending: Spending) -> Iterator[Refusal]:
    """Say no to a recipe (`asked`, of the run of that name) that would spend more than is left of a site's epsilon."""
    limit = site.policy.epsilon
    if limit is None:
        return
    try:
        before, after = spending.after(asked, run)
    except FedllmError as error:
        yield Refusal("epsilon", f"{site.name} cannot reckon what this recipe spends: {error}")
        return
    if not after <= limit:
        yield Refusal(
            "epsilon",
            f"{site.name} spends epsilon {limit:g} over its life at delta {site.policy.delta:g}; other runs have spent "
            f"{before:.3g} and this recipe would bring it to {after:.3g}.",
        )


def check(site: Site, asked: Asked, known: Known, weights: Callable[[str], str] | None = None) -> Refusal | None:
    """Return the first rule of the site that says no, or None."""
    return next(refusals(site, asked, known, weights), None)


def refusals(site: Site, asked: Asked, known: Known, weights: Callable[[str], str] | None = None) -> Iterator[Refusal]:
    """Yield every rule of the site that says no to a run.

    `weights` returns the hash of this site's weights of a base model, by its path or name; without
    it only the hashes in the site's file count. It is asked only when nothing else says no.
    """
    found = None
    for found in by_facts(site, asked, known):
        yield found
    if found is None:
        yield from by_weights(site, asked, weights)


def by_facts(site: Site, asked: Asked, known: Known) -> Iterator[Refusal]:
    """Yield what the site's file says no to."""
    policy, name = site.policy, site.name
    if series(asked.fedllm) != series(fedllm.__version__):
        yield Refusal(
            "version",
            f"{name} works with fedllm {series(fedllm.__version__)}, the server with {shown(asked.fedllm)}; "
            "install the same version on both sides.",
        )
    if policy.recipes is not None and asked.recipe not in policy.recipes:
        yield Refusal(
            "recipes",
            f"{name} allows certain recipes only, by their hash, and this one ({asked.recipe}) is not among them; "
            "its administrator can add it to policy.recipes.",
        )
    if policy.users is not None and asked.user not in policy.users:
        yield Refusal(
            "users", f"{name} lets {listed(policy.users)} start runs; this one was started by {shown(asked.user)}."
        )
    for rule, names in asked.names.items():
        said = getattr(policy, rule)
        allowed: Collection[str] = known.get(KINDS.get(rule, rule), names) if said is None else said
        for other in (each for each in dict.fromkeys(names) if each not in allowed):
            hint = f"; {nearest(other, allowed)}" if said is None else "."
            kinds = f"knows no such name among its {rule}" if said is None else f"allows the {rule} {listed(said)}"
            yield Refusal(rule, f"{name} {kinds}; this recipe has {shown(other)}{hint}")
    if site.models and asked.model not in site.models:
        yield Refusal(
            "models", f"{name} allows the models {listed(site.models)}; this recipe has {shown(asked.model)}."
        )
    if asked.model == "endpoint" and not (asked.model in site.models and site.models[asked.model].url):
        yield Refusal(
            "models",
            f"{name} sends its text to no API; its administrator can name one that it trusts: "
            '"endpoint" = { url = "https://..." } under [models].',
        )
    if policy.rounds_a_run is not None and asked.rounds > policy.rounds_a_run:
        yield Refusal(
            "rounds_a_run", f"{name} allows {policy.rounds_a_run} rounds a run; this recipe has {asked.rounds}."
        )
    if asked.compares and not policy.duplicates:
        yield Refusal(
            "duplicates", f"{name} lets no hashes of its texts leave, salted or not; this recipe has [duplicates]."
        )
    yield from of_privacy(name, policy, asked)


def by_weights(site: Site, asked: Asked, weights: Callable[[str], str] | None) -> Iterator[Refusal]:
    """Say no to a base model whose weights are not those of this site."""
    base = site.models.get(asked.model)
    ours = base.sha256 if base else None
    if ours is None and weights is not None:
        try:
            ours = weights((base and base.path) or asked.model)
        except FedllmError as error:
            yield Refusal("models", f"{site.name} cannot load {shown(asked.model)}: {error}")
            return
    if ours is not None and asked.model_sha256 != ours:
        yield Refusal(
            "models",
            f"{site.name} allows {shown(asked.model)} with the weights {ours[:12]}, the server has "
            f"{shown(asked.model_sha256[:12])}; get the same weights on both sides.",
        )


def of_privacy(name: str, policy: Policy, asked: Asked) -> Iterator[Refusal]:
    """Yield the least privacy that the recipe does not give."""
    if policy.clip is not None and (asked.clip is None or asked.clip > policy.clip):
        found = "does not end in a clip" if asked.clip is None else f"clips at {asked.clip:g}"
        yield Refusal(
            "clip",
            f"{name} sends only updates clipped at a norm of {policy.clip:g} or lower, with nothing after the clip "
            f"but {listed(sorted(KEEPS_NORM))}; this recipe {found}.",
        )
    if policy.epsilon is not None:
        parts = {*asked.names["transforms"], *asked.names["clients"]}
        together = SUM_NOISE | ({"dp_sgd"} if asked.noise_in_sum else set())
        trusted = SERVER_NOISE if policy.trust_server else set()
        trusted = trusted | (together if policy.trust_sites and asked.secure else set())
        if not parts & ((SITE_NOISE - together) | trusted):
            found = (
                "adds noise at the server only, which policy.trust_server does not count"
                if parts & SERVER_NOISE
                else "lets each site add its part of the noise, and policy.trust_sites does not count the others'"
                if parts & together
                else "adds none"
            )
            yield Refusal(
                "epsilon",
                f"{name} asks for noise that is worth epsilon {policy.epsilon:g} or lower, such as client.name = "
                f"'dp_sgd' or the transform 'local_dp'; this recipe {found}.",
            )
        elif asked.alone:
            yield Refusal(
                "epsilon",
                f"{name} lets nothing leave without noise, and each site's own model is told of without any; set "
                "evaluate.alone = false.",
            )
    if policy.secure_aggregation and not asked.secure:
        yield Refusal(
            "secure_aggregation",
            f"{name} sends no update that the server could read by itself; add [secure] to the recipe ([homomorphic] "
            "does not count: the server reads every update once one other site hands it the key).",
        )


def governing(site: Site) -> list[str]:
    """Return the names of the rules that a site has set."""
    return sorted(site.policy.model_fields_set | ({"models"} if site.models else set()))


def series(version: str) -> str:
    """Return the part of a version that both sides must share.

    >>> series("0.1.7")
    '0.1'
    """
    return ".".join(version.split(".")[:2])


def listed(names: Any) -> str:
    """Return names as one phrase."""
    return ", ".join(str(name) for name in names) or "none"


def shown(word: str) -> str:
    """Return what a peer sent as something that is safe to print."""
    return ascii(word[:64])
