"""How long a round would take over the links that silos have, beside data-parallel training over the same links.

Nothing here waits: these are functions of bytes and seconds. A silo's messages move at its bandwidth, or at the speed
that TCP keeps up at its loss, whichever is lower, and arrive one latency later.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from fedllm.core.errors import FedllmError, nearest

SEGMENT = 1460
"""Bytes of data in a TCP segment over Ethernet."""

FLOAT32 = 4
"""Bytes of a gradient's value in data-parallel training."""


class SiloLink(NamedTuple):
    """What connects a silo to all others, and how fast its machine is."""

    up: float
    """Megabits a second from the silo."""
    down: float
    """Megabits a second to the silo."""
    ms: float
    """Milliseconds that a message is under way, one way: half of what ping shows."""
    loss: float
    """Share of packets that are lost."""
    slowdown: float
    """By how much its compute takes longer than was measured."""


class Load(NamedTuple):
    """What one silo does in one round: bytes from it and to it, and seconds of compute."""

    up: int
    down: int
    seconds: float


class Spent(NamedTuple):
    """The seconds of one silo in one round; `whole` is less than their sum where they overlap."""

    compute: float
    communication: float
    whole: float


def link(
    mbit: float = 100.0,
    up: float | None = None,
    down: float | None = None,
    ms: float = 20.0,
    loss: float = 0.0,
    slowdown: float = 1.0,
) -> SiloLink:
    """Describe a link: `mbit` megabits a second both ways, or `up` and `down`; the rest as in `SiloLink`.

    Raises:
        FedllmError: a number that no link has.
    """
    given = SiloLink(mbit if up is None else up, mbit if down is None else down, ms, loss, slowdown)
    for key, value in given._asdict().items():
        if not math.isfinite(value) or value < 0 or (value == 0 and key in ("up", "down", "slowdown")):
            least = "at least 0" if key in ("ms", "loss") else "above 0"
            raise FedllmError(f"links: {key} is {value:g}; it must be {least}.")
    if loss >= 1:
        raise FedllmError(f"links: loss is {loss:g}; it is a share of the packets and must be below 1.")
    if loss and not ms:
        raise FedllmError("links: loss slows a link by its latency, and ms is 0; set ms.")
    return given


def links_of(
    names: Sequence[str], default: Mapping[str, Any], silos: Mapping[str, Mapping[str, Any]]
) -> dict[str, SiloLink]:
    """Return the link of every silo: what `silos` says of it, and for the rest what `default` says, as `link` takes it.

    Raises:
        FedllmError: a silo or a setting that is not known, or a value that no link has.
    """
    known = list(inspect.signature(link).parameters)
    for where, given in {"default": default, **{f"silos.{name}": each for name, each in silos.items()}}.items():
        for key, value in given.items():
            if key not in known:
                raise FedllmError(f"links.{where}.{key} is not a setting of a link; {nearest(key, known)}")
            if not isinstance(value, (int, float)) or isinstance(value, bool):
                raise FedllmError(f"links.{where}.{key} is {value!r}; it must be a number.")
    for name in silos.keys() - set(names):
        raise FedllmError(f"links.silos.{name} is not a silo of this run; {nearest(name, names)}")
    # A silo's own bandwidth is that of both its ways, whatever the others' are.
    both = {key: value for key, value in default.items() if key not in ("up", "down")}
    return {name: link(**{**(both if "mbit" in (own := silos.get(name, {})) else default), **own}) for name in names}


def rate(mbit: float, of: SiloLink) -> float:
    """Return the bytes a second that a link with this bandwidth moves.

    Mathis et al., The Macroscopic Behavior of the TCP Congestion Avoidance Algorithm, 1997: one connection
    with loss p keeps up at most MSS / RTT * sqrt(3/2) / sqrt(p), where every packet is acknowledged.
    """
    wire = mbit * 1e6 / 8
    if not of.loss:
        return wire
    round_trip = 2 * of.ms / 1000
    return min(wire, SEGMENT / round_trip * math.sqrt(1.5 / of.loss))


def spent(of: SiloLink, load: Load, overlap: bool = False) -> Spent:
    """Return the seconds of one silo's round: receive, compute, send; with `overlap` it computes meanwhile."""
    compute = load.seconds * of.slowdown
    received = of.ms / 1000 + load.down / rate(of.down, of) if load.down else 0.0
    sent = of.ms / 1000 + load.up / rate(of.up, of) if load.up else 0.0
    communication = received + sent
    return Spent(compute, communication, max(compute, communication) if overlap else compute + communication)


def round_seconds(links: Mapping[str, SiloLink], loads: Mapping[str, Load], overlap: bool = False) -> float:
    """Return how long a round takes: as long as its slowest silo's."""
    return max((spent(links[name], load, overlap).whole for name, load in loads.items()), default=0.0)


def all_reduce_seconds(links: Mapping[str, SiloLink], size: int) -> float:
    """Return how long a ring all-reduce of `size` bytes takes among these silos.

    Each of 2 (M - 1) steps brings size / M bytes from every silo to the next (Patarasuk and Yuan 2009, Bandwidth
    optimal all-reduce algorithms), so the slowest link and the longest latency set the pace.
    """
    steps = 2 * (len(links) - 1)
    if steps <= 0:
        return 0.0
    slowest = min(min(rate(each.up, each), rate(each.down, each)) for each in links.values())
    return steps * (size / len(links) / slowest + max(each.ms for each in links.values()) / 1000)


def data_parallel_seconds(
    links: Mapping[str, SiloLink], loads: Mapping[str, Load], parameters: int, steps: int, overlap: bool = False
) -> float:
    """Return how long the compute of a round takes where every one of its `steps` averages float32 gradients.

    The silos of `loads` take part, with the seconds that they compute in the round, spread evenly over its steps.
    With `overlap` a step's gradients travel while it computes.
    """
    if not loads or not steps:
        return 0.0
    compute = max(load.seconds * links[name].slowdown for name, load in loads.items()) / steps
    communication = all_reduce_seconds({name: links[name] for name in loads}, FLOAT32 * parameters)
    return steps * (max(compute, communication) if overlap else compute + communication)
