"""How many neighbours, shares and drop-outs: what a recipe says, and what follows from it for a number of silos."""

from __future__ import annotations

from functools import lru_cache
from typing import Literal, NamedTuple

from fedllm.core.errors import FedllmError
from fedllm.exchange.secure.graph import apart_chance, most_of

CHANCE = 2.0**-40
"""How likely it may be that the colluders among a silo's neighbours are too many, or that the graph falls apart."""

LATE_CHANCE = 2.0**-20
"""How likely it may be that so many of a silo's neighbours drop out that a round is given up."""


class Settings(NamedTuple):
    """What a recipe says of secure aggregation."""

    neighbours: int = 0
    """Silos with which each one shares masks (0: as few as are safe)."""
    drop_outs: int | None = None
    """Silos of a round that may be lost, in all its phases together, and the sum still be told (none said: a fifth)."""
    colluding: int = 0
    """Silos that may tell the server all that they know."""
    least: int = 3
    """Silos that a sum has at least."""
    bits: Literal[16, 32] = 32
    """Of each number on its way."""
    largest_weight: float = 10_000
    """The most that a silo may weigh (examples, or tokens); what is above counts as this."""
    groups: int = 1
    """Into how many the silos of a round are dealt; each has its own sum, with the drop-outs and colluders above."""
    largest_value: float | None = None
    """The most that a single value of an update may be, where that is less than the update's norm may be."""


class SumNoise(NamedTuple):
    """Noise that the silos add together."""

    multiplier: float
    sensitivity: float
    """The L2 norm by which one silo (or record) changes the sum; the noise's standard deviation is their product."""


class Circle(NamedTuple):
    """A round's silos: how many, and what follows from the settings."""

    silos: int
    neighbours: int
    threshold: int
    """Shares that bring a secret back; a silo and each of its neighbours hold one."""
    drop_outs: int
    """Of those that may be lost, how many are still left."""
    honest: int
    """Silos at least whose part is in a sum and who do not collude."""


def require_settings(settings: Settings) -> None:
    """Raise for settings that cannot be meant."""
    least = {"neighbours": 0, "drop_outs": 0, "colluding": 0, "least": 3, "groups": 1, "largest_weight": 1}
    for key, floor in least.items():
        value = getattr(settings, key)
        if value is not None and not value >= floor:
            raise FedllmError(f"secure.{key} is {value:g}; it must be at least {floor}.")
    if settings.largest_weight > 2**20:
        raise FedllmError(f"secure.largest_weight is {settings.largest_weight:g}; it must be at most {2**20:,}.")
    if settings.largest_value is not None and not settings.largest_value > 0:
        raise FedllmError(f"secure.largest_value is {settings.largest_value:g}; it must be above 0.")


@lru_cache(maxsize=256)
def circle(settings: Settings, silos: int, asked: int) -> Circle:
    """Return what the settings come to for so many silos of those that were asked; every silo reckons it for itself.

    With h = neighbours + 1 holders of a secret, of whom c collude, and a threshold t > (h + c) / 2, a server that asks
    half of the honest ones for one kind of share and half for the other gets too few of one (Bonawitz et al. 2017,
    section 6.2, with h for n). So many shares must be left when silos drop out.

    >>> circle(Settings(), 10, 10)
    Circle(silos=10, neighbours=8, threshold=5, drop_outs=2, honest=8)
    >>> circle(Settings(neighbours=8, drop_outs=3), 10, 10).threshold
    5
    >>> circle(Settings(drop_outs=1), 3, 4).drop_outs
    0

    Raises:
        FedllmError: where no sum could be told, or not with the protection that was asked for.
    """
    if silos < settings.least:
        raise FedllmError(
            f"Secure aggregation has {silos} silos and secure.least is {settings.least}; a sum of fewer would tell too "
            "much of each."
        )
    said, gone = min(settings.neighbours, silos - 1), asked - silos
    allowed = max(1, asked // 5) if settings.drop_outs is None else settings.drop_outs
    if gone > allowed:
        raise FedllmError(f"Of {asked} silos {gone} are lost already and {allowed} may be; raise secure.drop_outs.")
    usual = range(min(allowed - gone, silos - settings.least), -1, -1)
    for drop_outs in usual if settings.drop_outs is None else [allowed - gone]:
        for neighbours in [said] if said else range(min(8, silos - 1), silos):
            if found := fitting(settings, silos, neighbours, drop_outs):
                return found
    drops = "" if settings.drop_outs is None else f", secure.drop_outs is {settings.drop_outs}"
    odd = said % 2 and said < silos - 1
    remedy = "an even number or 0" if odd else "0, which finds it, or let fewer drop out or collude"
    raise FedllmError(
        f"Secure aggregation of {silos} silos does not fit: secure.neighbours is {settings.neighbours}{drops}, "
        f"secure.colluding is {settings.colluding}; set secure.neighbours to {remedy}."
    )


def fitting(settings: Settings, silos: int, neighbours: int, drop_outs: int) -> Circle | None:
    """Return the circle with so many neighbours each, or None if it would not be safe or would not bear drop-outs."""
    if neighbours < silos - 1 and neighbours % 2:
        return None
    holders = neighbours + 1
    close = most_of(settings.colluding, silos, neighbours, CHANCE / silos)
    threshold = (holders + close) // 2 + 1
    lost = most_of(drop_outs, silos, neighbours, LATE_CHANCE / silos)
    honest = silos - drop_outs - settings.colluding
    if threshold > holders - lost or silos - drop_outs < settings.least or honest < 2:
        return None
    if apart_chance(silos, neighbours, settings.colluding + drop_outs) > CHANCE:
        return None
    return Circle(silos, neighbours, threshold, drop_outs, honest)
