"""What robust rules have in common: they hold all updates of a round and go through them place by place."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.tensors import pieces, whole_again
from fedllm.core.types import Aggregator, Facts, Tensors


def by_place(name: str, rule: Callable[[Tensor], Tensor]) -> Aggregator:
    """Return the aggregator that makes of the updates' values at each place, [updates, places], one value a place.

    Every update counts alike, whatever its weight. In memory are all updates of a round. Behind [secure] an update is
    the sum of a group of silos.
    """

    def zero(like: Tensors) -> tuple[Tensors, list[Tensors]]:
        return like, []

    def add(total: tuple[Tensors, list[Tensors]], update: Tensors, weight: float) -> tuple[Tensors, list[Tensors]]:
        return total[0], [*total[1], update]

    def done(total: tuple[Tensors, list[Tensors]]) -> dict[str, Tensor]:
        like, updates = total
        in_order = [[update[name] for name in like] for update in updates]
        each = zip(*map(pieces, in_order), strict=True)
        return whole_again((rule(torch.stack([part.double() for part in parts])) for parts in each), like)

    def claim(facts: Facts) -> Facts:
        if facts.sees in ("sum", "part"):
            raise FedllmError(
                f"aggregate.name is '{name}', which compares updates, and the server sees only their sum; set "
                "secure.groups to 3 or more, and it compares the sums of so many groups of silos, or take out [secure]."
            )
        return facts._replace(even=False)

    return Aggregator(name, zero, add, done, claim)
