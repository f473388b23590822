"""What a server asks a site for, as the facts that the site's rules speak of."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedllm.core.errors import Refused
from fedllm.federation.policy import KINDS

KEEPS_NORM = {"cast"}
"""Transforms after which a clipped update is still clipped; what adds or scales values undoes it."""

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
    user: str
    fedllm: str


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
        user=text(said, "user"),
        fedllm=text(said, "fedllm"),
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
        if part.get("name") == "clip":
            norm = part.get("max_norm")
            if not isinstance(norm, (int, float)) or isinstance(norm, bool) or not 0 < norm < 1e300:
                raise Refused(f"the recipe clips at {norm!r:.50}, which is not a norm")
            bound = min(bound, float(norm))
        elif part.get("name") not in KEEPS_NORM:
            bound = math.inf
    return None if bound == math.inf else bound
