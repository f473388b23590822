"""What a recipe's `[secure]` or `[homomorphic]` is made from, and what both refuse."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import NamedTuple

from fedllm.app.config import Recipe
from fedllm.app.privacy import in_sum
from fedllm.core.errors import FedllmError
from fedllm.core.round import wire_stages
from fedllm.core.types import Facts, Share, Tensors, Transform, Work


class Wanted(NamedTuple):
    """All that a sum in place of the silos' updates depends on."""

    recipe: Recipe
    work: Work
    share: Share
    transforms: Sequence[Transform]
    params: Tensors
    silos: int
    secret: bytes
    """What a node draws its keys and its chance from."""
    key: bytes | None = None
    """What the silos share and the server does not know, where they are other machines."""

    @property
    def weighted(self) -> bool:
        """Whether a silo counts by its weight; else all alike."""
        return bool(self.recipe.aggregate.get("weights", "examples") == "examples")

    def like(self, number: int) -> Tensors:
        """Return on the meta device what a silo's update looks like when it leaves in a round."""
        return wire_stages(self.transforms, self.share.up(number, self.params))[-1]

    def norm_bound(self) -> float | None:
        """Return the largest norm of an update when it leaves, if there is one."""
        facts = self.work.claim(Facts())
        for transform in self.transforms:
            before, facts = facts, transform.claim(facts)
            if in_sum(self.recipe) and not (facts.norm_bound or math.inf) <= (before.norm_bound or math.inf):
                raise FedllmError(
                    f"transforms: '{transform.name}' sends in a round also what was left over from earlier ones, and "
                    "the noise of client.noise_in = 'sum' is measured for one round's records; set error_feedback = "
                    "false."
                )
        return facts.norm_bound

    def require_sums(self, table: str) -> None:
        """Raise where silos would tell the server something of their own beside a sum."""
        if self.share.partial:
            raise FedllmError(
                f"share.name is '{self.recipe.share['name']}', whose silos tell scores of their own; with {table} use "
                "share.name = 'everything'."
            )
        if self.recipe.evaluate.alone:
            raise FedllmError(
                f"evaluate.alone tells what each silo reaches by itself, and with {table} that of no silo is told; set "
                "evaluate.alone = false."
            )


def require_packages(table: str, extra: str, packages: Mapping[str, str]) -> None:
    """Raise where a table's packages, each by the module that it brings, are not installed; nothing is imported."""
    if missing := [package for module, package in packages.items() if find_spec(module) is None]:
        raise FedllmError(
            f"{table} needs what is not installed ({', '.join(missing)}); run `pip install 'fedllm[{extra}]'`."
        )
