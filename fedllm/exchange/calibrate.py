"""Updates made anew at their recorded length: the server's half of FedEraser (Liu et al. 2021, IWQoS, section III).

To forget a client FedEraser replays the rounds without it. The others train fewer steps from the model as it is now,
which gives a direction, and the update that each of them sent in that round gives the length (equation 4):

    calibrated = ||recorded|| * made anew / ||made anew||

Only the length of an update is ever used, so that is all that is recorded: one number a silo and round, where the paper
keeps the updates. It differs also in the first replayed round, which is calibrated like the others.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence

import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Claim, Exchange, Facts, Middleware, Reply, Request, Tensors

NORM = "norm"
"""What the report of a round calls the length of a silo's update."""


def record_norms() -> Middleware:
    """Note the L2 norm of each silo's update, as the server measures it, in the report of the round."""

    def wrapped(exchange: Exchange) -> Exchange:
        def around(requests: Sequence[Request]) -> Iterator[Reply]:
            for reply in exchange(requests):
                found = norm(reply.tensors)
                # An update that is not finite is dropped further on, with its reason.
                yield reply._replace(scalars={**reply.scalars, NORM: found}) if math.isfinite(found) else reply

        return around

    return Middleware("note norms", wrapped, claim=sees_each("keep.norms notes how long each silo's update is"))


def calibrate(norms: Mapping[str, Sequence[float]]) -> Middleware:
    """Scale each silo's update to its recorded L2 norm: `norms` has one a round for each silo, 0 where it sent none.

    A silo is not asked in a round of which nothing was recorded of it.
    """

    def recorded(number: int, client: str) -> float:
        known = norms.get(client, ())
        return known[number] if number < len(known) else 0.0

    def lost(number: int, client: str) -> str | None:
        return None if recorded(number, client) > 0 else "of this round no update of it was recorded"

    def wrapped(exchange: Exchange) -> Exchange:
        def around(requests: Sequence[Request]) -> Iterator[Reply]:
            for reply in exchange([each for each in requests if lost(each.round, each.client) is None]):
                yield scaled(reply, recorded(reply.round, reply.client))

        return around

    return Middleware("calibrate", wrapped, claim=sees_each("Calibration scales each silo's update"), lost=lost)


def scaled(reply: Reply, target: float) -> Reply:
    """Return the reply with an update of this norm; one of 0, or one that is not finite, stays as it is."""
    own = norm(reply.tensors)
    if not (math.isfinite(own) and own > 0):
        return reply
    return reply._replace(
        tensors={name: (value.double() * (target / own)).to(value.dtype) for name, value in reply.tensors.items()}
    )


def norm(tensors: Tensors) -> float:
    """Return the L2 norm over all tensors.

    >>> norm({"a": torch.tensor([3.0]), "b": torch.tensor([[4.0]])})
    5.0
    """
    return math.sqrt(sum(float(torch.linalg.vector_norm(value.double())) ** 2 for value in tensors.values()))


def sees_each(what: str) -> Claim:
    """Return the claim of what looks at single updates."""

    def claim(facts: Facts) -> Facts:
        if facts.sees != "each":
            raise FedllmError(
                f"{what}, and behind a sum the server sees none; take it out, or forget by exact replay, which needs "
                "no record."
            )
        return facts

    return claim
