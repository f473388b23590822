"""What a site's policy says to a recipe, rule by rule, before any of its text is touched."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import Any, NamedTuple

import fedllm
from fedllm.core.errors import FedllmError, nearest
from fedllm.federation.asked import KEEPS_NORM, Asked
from fedllm.federation.policy import KINDS, Known, Policy, Site


class Refusal(NamedTuple):
    """A rule that says no, and a sentence that says what the site allows."""

    rule: str
    sentence: str


class Denied(Exception):
    """The site says no; carries the refusal."""

    def __init__(self, rule: str, sentence: str) -> None:
        super().__init__(sentence)
        self.refusal = Refusal(rule, sentence)


def check(site: Site, asked: Asked, known: Known, weights: Callable[[str], str] | None = None) -> Refusal | None:
    """Return the first rule of the site that says no, or None."""
    return next(refusals(site, asked, known, weights), None)


def refusals(site: Site, asked: Asked, known: Known, weights: Callable[[str], str] | None = None) -> Iterator[Refusal]:
    """Yield every rule of the site that says no to a run.

    `weights` returns the hash of this site's weights of a base model, by its path or name; without
    it only the hashes in the site's file count.
    """
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
    yield from of_model(site, asked, weights)
    if policy.rounds_a_run is not None and asked.rounds > policy.rounds_a_run:
        yield Refusal(
            "rounds_a_run", f"{name} allows {policy.rounds_a_run} rounds a run; this recipe has {asked.rounds}."
        )
    yield from of_privacy(name, policy, asked)


def of_model(site: Site, asked: Asked, weights: Callable[[str], str] | None) -> Iterator[Refusal]:
    """Yield what the site's list of base models says no to."""
    if site.models and asked.model not in site.models:
        yield Refusal(
            "models", f"{site.name} allows the models {listed(site.models)}; this recipe has {shown(asked.model)}."
        )
        return
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
        yield Refusal(
            "epsilon",
            f"{name} asks for differential privacy with epsilon {policy.epsilon:g} or lower, which no recipe of "
            f"fedllm {fedllm.__version__} can guarantee yet.",
        )
    if policy.secure_aggregation:
        yield Refusal(
            "secure_aggregation",
            f"{name} asks for secure aggregation, which no recipe of fedllm {fedllm.__version__} can guarantee yet.",
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
