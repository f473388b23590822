"""Silos that come late, leave, come back, are slow, or whose replies get lost: what a run on one machine can try out.

All of it is a pure function of seed, silo and round, so a resumed run meets the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from fedllm.core.errors import FedllmError, nearest
from fedllm.core.seeds import derive
from fedllm.core.types import Exchange, Middleware, Reply, Request


class Presence(NamedTuple):
    """When a silo is there, and how well; rounds are counted from 1, as everywhere that a user sees them."""

    first: int = 1
    last: int | None = None
    away: Sequence[Sequence[int]] = ()
    """The first and the last round of each absence."""
    drop: float = 0.0
    slow: float = 1.0

    def there(self, number: int) -> bool:
        """Say whether the silo is there in a round, counted from 1."""
        gone = any(first <= number <= last for first, last in self.away)
        return self.first <= number <= (self.last or number) and not gone


AWAY = "it is away"
"""Why a silo that was not reached sent nothing."""

KEYS = {"from": "first", "until": "last", "away": "away", "drop": "drop", "slow": "slow"}
"""What a recipe says of a silo -> the field."""


def availability(silos: Mapping[str, Presence], seed: int) -> Middleware:
    """Let silos be away, lose their replies, or take fewer steps.

    A silo that is away is not reached: it is sent nothing, trains nothing, and remembers what it did. When it comes,
    or comes back, it is sent the server's newest weights.

    A reply is lost with probability `drop`, after the silo has trained. As over a real network the silo does not know:
    its optimiser's moments go on, and of its error feedback stays what the codec held back, while what the lost
    message carried is gone. In its next round it begins from the server's weights; in DiLoCo's own experiment
    (Douillard et al. 2023, arXiv:2311.08105, asynchronous communication) such a worker goes on from its own.

    A silo that is `slow` takes floor(steps / slow) steps, at least one, so that the others need not wait for it:
    Dynamic Local Updates of Liu et al. 2024 (arXiv:2401.09135), here in rounds that take all silos the same time. A
    mean by examples gives its short way the weight of a whole one; `client.weight = "tokens"` counts what it read.

    A round in which nobody is left changes nothing, and the run goes on.
    """

    def lost(number: int, name: str) -> str | None:
        silo = silos.get(name, Presence())
        if not silo.there(number + 1):
            return AWAY
        return "its reply was lost" if derive(seed, "lost", name, number) < silo.drop * 2**63 else None

    def wrapped(exchange: Exchange) -> Exchange:
        def around(requests: Sequence[Request]) -> Iterator[Reply]:
            reached = [slowed(each) for each in requests if silos.get(each.client, Presence()).there(each.round + 1)]
            trained = {each.client for each in reached if each.op == "train"}
            for reply in exchange(reached):
                if reply.client not in trained or lost(reply.round, reply.client) is None:
                    yield reply

        return around

    def slowed(request: Request) -> Request:
        slow = silos.get(request.client, Presence()).slow
        return request._replace(scalars={**request.scalars, "slow": slow}) if slow > 1 else request

    return Middleware("availability", wrapped, lost=lost)


def presences(
    names: Sequence[str], drop: float, silos: Mapping[str, Mapping[str, Any]], rounds: int
) -> dict[str, Presence]:
    """Return when every silo is there: what `silos` says of it, and `drop` for all of which it says no other.

    Raises:
        FedllmError: a silo or a key that is not known, a value that makes no sense, or a round without any silo.
    """
    for name in silos.keys() - set(names):
        raise FedllmError(f"availability.silos.{name} is not a silo of this run; {nearest(name, names)}")
    found = {name: presence(f"availability.silos.{name}", {"drop": drop, **silos.get(name, {})}) for name in names}
    for name, silo in found.items():
        if not any(silo.there(number) for number in range(1, rounds + 1)) and rounds:
            raise FedllmError(
                f"availability.silos.{name} is there in none of the {rounds} rounds; change its rounds or leave it out."
            )
    for number in range(1, rounds + 1):
        if not any(silo.there(number) for silo in found.values()):
            raise FedllmError(f"availability: no silo is there in round {number}; let one of them stay.")
    return found


def presence(where: str, given: Mapping[str, Any]) -> Presence:
    """Return what a table says of one silo, or say what is wrong with it."""
    for key in given:
        if key not in KEYS:
            raise FedllmError(f"{where}.{key} is not a setting of a silo's availability; {nearest(key, KEYS)}")
    silo = Presence(**{KEYS[key]: value for key, value in given.items()})
    for key in ("from", "until"):
        if key in given and not (whole(given[key]) and given[key] >= silo.first):
            least = "that of 'from' or later" if key == "until" and whole(silo.first) else "1 or a later one"
            raise FedllmError(f"{where}.{key} is {given[key]!r}; it is the number of a round, {least}.")
    pairs: Sequence[Any] = silo.away if isinstance(silo.away, (list, tuple)) else [silo.away]
    for pair in pairs:
        if not (isinstance(pair, (list, tuple)) and len(pair) == 2 and all(map(whole, pair)) and pair[0] <= pair[1]):
            raise FedllmError(
                f"{where}.away is {silo.away!r}; list the first and last round of each absence: [[4, 6]]."
            )
    if not (number(silo.drop) and 0 <= silo.drop < 1):
        raise FedllmError(
            f"{where}.drop is {silo.drop!r}; it is the share of replies that are lost, from 0 to below 1."
        )
    if not (number(silo.slow) and 1 <= silo.slow < math.inf):
        raise FedllmError(f"{where}.slow is {silo.slow!r}; it says how many times slower the silo is, 1 or more.")
    return silo


def whole(value: Any) -> bool:
    """Say whether this can be the number of a round."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 1


def number(value: Any) -> bool:
    """Say whether this is a number."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def told(silos: Mapping[str, Presence]) -> Iterator[str]:
    """Yield what is said of each silo that is not always there and whole."""
    for name, silo in silos.items():
        parts = [
            f"from round {silo.first}" * (silo.first > 1),
            f"until round {silo.last}" * (silo.last is not None),
            *(f"away in rounds {first} to {last}" for first, last in silo.away),
            f"{silo.drop:.0%} of its replies lost" * (silo.drop > 0),
            f"{silo.slow:g} times slower" * (silo.slow > 1),
        ]
        if said := ", ".join(filter(None, parts)):
            yield f"{name} {said}"
