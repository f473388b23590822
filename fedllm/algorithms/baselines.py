"""What federation is held against: each silo alone, and training on everything in one place.

Both take the same local steps as the federated run did, with one optimiser from start to end.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from fedllm.core.tensors import subtract
from fedllm.core.types import Exchange, Request, Tensors


def alone(exchange: Exchange, params: Tensors, silos: Sequence[str]) -> Iterator[tuple[str, Tensors]]:
    """Train each silo from `params` on its own text; yield its name and its parameters."""
    for reply in exchange([Request(name, 0, "train", params) for name in silos]):
        yield reply.client, subtract(params, reply.tensors)


def budget(asked: Sequence[Sequence[str]]) -> dict[str, int]:
    """Return in how many rounds each silo took part.

    >>> budget([["a", "b"], ["a"]])
    {'a': 2, 'b': 1}
    """
    rounds: dict[str, int] = {}
    for names in asked:
        for name in names:
            rounds[name] = rounds.get(name, 0) + 1
    return rounds
