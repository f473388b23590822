"""Whose is it? Updates and texts told apart by silo.

An update without a name is given to the silo whose earlier update points most nearly the same way: what secure
aggregation or a shuffler would hide. A text is given to the silo whose update lowers its loss the most (a membership
attack on updates, as in Melis et al. 2019, arXiv:1805.04049, section 4, with silos in the place of records).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from fedllm.core.types import Tensors


def flat(update: Tensors) -> Tensor:
    """Return all values of an update in a row, as float64, of length 1."""
    values = torch.cat([value.detach().double().flatten() for value in update.values()])
    return values / values.norm().clamp(min=1e-30)


def attributed(known: Mapping[str, Tensors], unknown: Mapping[str, Tensors]) -> dict[str, str]:
    """Return for each unknown update the silo whose known one has the largest cosine with it."""
    names, rows_SN = list(known), torch.stack([flat(update) for update in known.values()])
    return {name: names[int((rows_SN @ flat(update)).argmax())] for name, update in unknown.items()}


def lowest(losses: Mapping[str, Sequence[float]]) -> list[str]:
    """Return for each text the silo with whose update its loss is lowest.

    >>> lowest({"a": [1.0, 3.0], "b": [2.0, 1.0]})
    ['a', 'b']
    """
    names = list(losses)
    return [names[min(range(len(names)), key=each.__getitem__)] for each in zip(*losses.values(), strict=True)]
