"""The server's half: four phases over the exchange, and a sum that is right or is not told.

What a silo sends is trusted with nothing: keys are checked to be points, shares to bring back what was promised, and
the sum to count as many silos as there are in it. Several sums, of a group of silos each, go through a phase together.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple, TypeAlias, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import LATE, Exchange, Reply, Request, Tensors
from fedllm.exchange.secure.beside import SIZE, losses_in
from fedllm.exchange.secure.fixed_point import values_of
from fedllm.exchange.secure.graph import dealt, neighbours_of
from fedllm.exchange.secure.keys import (
    BOX_BYTES,
    KEY_BYTES,
    agreed,
    commitment,
    derived,
    pair_of,
    require_point,
)
from fedllm.exchange.secure.masks import Mask, Numbers, masked
from fedllm.exchange.secure.messages import (
    KEYS,
    PART,
    SHARES,
    SUM,
    TAIL,
    TRAIN,
    Directory,
    as_bytes,
    as_tensor,
    boxes_of,
    context_of,
    flags,
    written,
)
from fedllm.exchange.secure.settings import Circle, circle
from fedllm.exchange.secure.shares import joined
from fedllm.exchange.secure.silo import BAD, Made, tail_of

TOO_LATE = f"{LATE}: its masked update came when the others were being unmasked, and was not used"


@dataclass
class Sum:
    """A round at the server: what it knows so far, and why silos are not in it."""

    directory: Directory
    circle: Circle
    context: bytes
    graph: list[list[int]]
    boxes: dict[int, list[bytes]] = field(default_factory=dict)
    """From each silo that shared out its keys: a box for each holder."""
    checks: dict[int, bytes] = field(default_factory=dict)
    total: Numbers | None = None
    tail: Numbers = field(default_factory=lambda: np.zeros(SIZE, np.uint32))
    kept: set[int] = field(default_factory=set)
    """Those whose masked update is in the total."""

    def holders(self, place: int) -> list[int]:
        """Return who holds shares of a silo's secrets."""
        return sorted([place, *self.graph[place]])


class Phase(NamedTuple):
    """One phase of one sum: what is asked, and what becomes of each silo's first answer."""

    requests: Sequence[Request]
    take: Callable[[Reply], None]
    """Raises `Refused` for an answer that cannot be used: its silo is lost."""
    what: str
    """What a silo that sends nothing is lost for; empty where it is not."""
    stale: Callable[[Reply], bool] = lambda reply: False
    """Whether a reply is one to an earlier phase, and comes too late."""


Found = TypeVar("Found")

Steps: TypeAlias = Generator[Phase, None, Found]
"""A part of a sum as it goes: it yields the phases that it needs, and returns what it found."""


def secure_exchange(exchange: Exchange, made: Made, like: Callable[[int], Tensors], seed: int = 0) -> Exchange:
    """Let only the mean of all updates through, or of each group's; `like` says for a round what an update looks like.

    Groups are dealt anew in each round, by `seed`.
    """

    def secured(requests: Sequence[Request]) -> Iterator[Reply]:
        train = {request.client: request for request in requests if request.op == TRAIN}
        if rest := [request for request in requests if request.op != TRAIN]:
            yield from exchange(rest)
        if train:
            number = next(iter(train.values())).round
            groups = dealt([*train], made.settings.groups, seed, number)
            yield from side_by_side([[train[name] for name in group] for group in groups], exchange, made, like(number))

    return secured


def side_by_side(groups: Sequence[Sequence[Request]], exchange: Exchange, made: Made, like: Tensors) -> Iterator[Reply]:
    """Yield the mean of each group, or who is lost where there is none; no group waits for another in a phase."""
    lost: list[dict[str, str]] = [{} for _ in groups]
    sums = {place: summed(requests, made, like, lost[place]) for place, requests in enumerate(groups)}
    problem: Refused | None = None
    while sums:
        phases = dict[int, Phase]()
        for place in list(sums):
            step = sums[place].throw(problem) if problem else next(sums[place])
            if isinstance(step, Phase):
                phases[place] = step
            else:
                del sums[place]
                yield step if len(groups) == 1 else step._replace(client=f"sum {place + 1}")
        try:
            hear(exchange, phases, lost)
        except Refused as refused:
            # A silo of this process raises what one elsewhere keeps to itself.
            problem = refused


def hear(exchange: Exchange, phases: Mapping[int, Phase], lost: Sequence[dict[str, str]]) -> None:
    """Ask all at once, and let each sum take the first answer of each of its silos; note those who send none."""
    waiting = {request.client: place for place, phase in phases.items() for request in phase.requests}
    requests = [request for phase in phases.values() for request in phase.requests]
    for reply in exchange(requests) if requests else ():
        if reply.round != requests[0].round:
            continue
        if any(phase.stale(reply) for phase in phases.values()):
            for each in lost:
                if reply.client in each:
                    each[reply.client] = TOO_LATE
        elif (place := waiting.pop(reply.client, None)) is not None:
            try:
                phases[place].take(reply)
            except Refused as problem:
                lost[place][reply.client] = str(problem)
        # The next one is on its way, and two large ones need not be in memory.
        del reply
    for name, place in sorted(waiting.items()):
        if what := phases[place].what:
            lost[place].setdefault(name, f"{what} did not come")


def summed(
    requests: Sequence[Request], made: Made, like: Tensors, lost: dict[str, str]
) -> Generator[Phase | Reply, None, None]:
    """Yield the phases of a sum, and at last the mean by weight of the silos' updates with `lost`: who is not in it.

    Where too few silos are left, or what they sent does not fit together, nothing is told and all are lost.
    """
    number, asked = requests[0].round, {request.client: request for request in requests}
    try:
        now = yield from opened([*asked], number, made)
        yield from share_keys(now, number)
        yield from take_updates(now, asked, made, like)
        unmask(now, (yield from unmasking(now, number)))
        reply = told(now, number, made, like)
    except Refused as problem:
        reply = Reply("", number, {}, 0.0)
        lost |= {**{name: f"no sum: {problem}" for name in asked}, **lost}
    yield reply._replace(lost=lost)


def opened(asked: Sequence[str], number: int, made: Made) -> Steps[Sum]:
    """Phase 1: ask all for their keys; who sends none, or a bad one, is not part of the round."""
    keys = dict[str, list[bytes]]()

    def take(reply: Reply) -> None:
        sent = as_bytes(reply.tensors.get(f"{PART}/keys"), 2, KEY_BYTES, "keys")
        for public in sent:
            require_point(public)
        if {*sent} & {each for other in keys.values() for each in other} or len({*sent}) < 2:
            raise Refused("its keys are another silo's")
        keys[reply.client] = sent

    yield Phase([Request(name, number, KEYS, {}) for name in asked], take, "its keys")
    names = sorted(keys)
    directory = Directory(names, [keys[name][0] for name in names], [keys[name][1] for name in names], len(asked))
    context = context_of(directory, number, made.settings)
    try:
        now = circle(made.settings, len(names), len(asked))
    except FedllmError as error:
        raise Refused(str(error).rstrip(".")) from error
    return Sum(directory, now, context, neighbours_of(len(names), now.neighbours, context))


def share_keys(now: Sum, number: int) -> Steps[None]:
    """Phase 2: let all share out their secrets among their neighbours."""

    def take(reply: Reply) -> None:
        place = now.directory.place(reply.client)
        boxes = boxes_of(reply.tensors, len(now.holders(place)))
        (now.checks[place],) = as_bytes(reply.tensors.get(f"{PART}/check"), 1, KEY_BYTES, "check")
        now.boxes[place] = boxes

    asked = [Request(name, number, SHARES, written(now.directory)) for name in now.directory.names]
    yield Phase(asked, take, "its shares of keys")
    require_enough(now, len(now.boxes))


def take_updates(now: Sum, asked: Mapping[str, Request], made: Made, like: Tensors) -> Steps[None]:
    """Phase 3: let them train, and add up what comes, modulo 2^bits."""
    beside = written(now.directory, there=flags(now.boxes, now.circle.silos))
    whole, requests = dict[int, Tensors](), list[Request]()
    for place in sorted(now.boxes):
        request = asked[now.directory.names[place]]
        # The same weights go to many silos, and are packed once if they are the same object.
        tensors = whole.setdefault(id(request.tensors), {**request.tensors, **beside})
        requests.append(request._replace(tensors=tensors))
    grid = made.grid(now.circle)
    names = sorted(like)
    total = np.zeros(sum(like[name].numel() for name in names), grid.kind)

    def take(reply: Reply) -> None:
        numbers = numbers_of(reply.tensors, like, grid.kind)
        start = 0
        for each in names:
            total[start : start + numbers[each].size] += numbers[each]
            start += numbers[each].size
        now.tail += numbers[TAIL]
        now.kept.add(now.directory.place(reply.client))

    yield Phase(requests, take, "its masked update")
    now.total = total
    require_enough(now, len(now.kept))


def numbers_of(tensors: Tensors, like: Tensors, kind: type[np.unsignedinteger]) -> dict[str, Numbers]:
    """Return the whole numbers of a masked update, or raise `Refused` where it does not look like one."""
    expected = {name: (value.shape, torch.int16 if kind is np.uint16 else torch.int32) for name, value in like.items()}
    expected[TAIL] = (torch.Size([SIZE]), torch.int32)
    found = {name: (value.shape, value.dtype) for name, value in tensors.items()}
    if found != expected:
        odd = sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name))
        raise Refused(f"its masked update has not the names, shapes and types that were expected, such as '{odd[0]}'")
    return {
        name: value.contiguous().numpy().ravel().view(np.uint32 if name == TAIL else kind)
        for name, value in tensors.items()
    }


def unmasking(now: Sum, number: int) -> Steps[dict[int, bytes]]:
    """Phase 4: return each silo's secret, from its holders' shares: the own mask's, or of the lost the key's."""
    said, requests = flags(now.boxes, now.circle.silos), list[Request]()
    kept = flags(now.kept, now.circle.silos)
    for place in sorted(now.kept):
        boxes = [now.boxes[source][now.holders(source).index(place)] for source in sources(now, place)]
        tensors = written(now.directory, there=said, kept=kept, boxes=as_tensor(boxes, BOX_BYTES))
        requests.append(Request(now.directory.names[place], number, SUM, tensors))
    shares: dict[int, dict[int, bytes]] = {place: {} for place in now.boxes}

    def take(reply: Reply) -> None:
        place = now.directory.place(reply.client)
        try:
            found = as_bytes(reply.tensors.get(f"{PART}/shares"), len(sources(now, place)), KEY_BYTES, "shares")
        except Refused:
            # Its update is in the sum, and others hold what it holds.
            return
        for source, share in zip(sources(now, place), found, strict=True):
            if share != BAD:
                shares[source][now.holders(source).index(place)] = share

    # Who sends no shares is in the sum all the same.
    yield Phase(requests, take, "", stale=lambda reply: TAIL in reply.tensors)
    return {place: secret_of(now, place, shares[place]) for place in sorted(shares)}


def sources(now: Sum, place: int) -> list[int]:
    """Return the silos of whose secrets one holds shares."""
    return [other for other in now.holders(place) if other in now.boxes]


def secret_of(now: Sum, place: int, shares: Mapping[int, bytes]) -> bytes:
    """Return the secret of one silo, checked against what it promised."""
    name = now.directory.names[place]

    def right(secret: bytes) -> bool:
        if place in now.kept:
            return commitment(secret, now.context) == now.checks[place]
        return pair_of(secret).public == now.directory.mask[place]

    try:
        return joined(shares, now.circle.threshold, right)
    except Refused as problem:
        raise Refused(f"'{name}' cannot be unmasked: {problem}") from problem


def unmask(now: Sum, secrets: Mapping[int, bytes]) -> None:
    """Take off the own masks of those in the sum, and what they share with those who are not."""
    masks = list[Mask]()
    for place, secret in secrets.items():
        if place in now.kept:
            masks.append(Mask(derived(secret, now.context, "own"), False))
            continue
        for other in now.graph[place]:
            if other in now.kept:
                key = agreed(secret, now.directory.mask[other], now.context, "mask")
                # The first of the two added it.
                masks.append(Mask(key, other > place))
    assert now.total is not None
    masked(now.total, masks)
    masked(now.tail, [tail_of(mask, now.context) for mask in masks])


def told(now: Sum, number: int, made: Made, like: Tensors) -> Reply:
    """Return the mean, if the sum says itself that it is one of these silos."""
    count, weight = (int(each) for each in now.tail[:2])
    most = int(made.settings.largest_weight) if made.weighted else 1
    if count != len(now.kept) or not count <= weight <= count * most:
        raise Refused(f"the sum says that it is of {count} silos that weigh {weight}, and it is of {len(now.kept)}")
    assert now.total is not None
    mean: NDArray[np.float64] = values_of(now.total, made.grid(now.circle)) * (most / weight)
    sizes = [like[name].numel() for name in sorted(like)]
    pieces = np.split(mean, np.cumsum(sizes)[:-1])
    tensors: dict[str, Tensor] = {
        name: torch.from_numpy(piece.astype(np.float32)).view(like[name].shape)
        for name, piece in zip(sorted(like), pieces, strict=True)
    }
    members = [now.directory.names[place] for place in sorted(now.kept)]
    return Reply("the sum", number, tensors, float(weight), losses_in(now.tail, now.circle.silos), members)


def require_enough(now: Sum, left: int) -> None:
    """Give the round up where more silos are lost than the settings bear."""
    least = now.circle.silos - now.circle.drop_outs
    if left < least:
        raise Refused(f"{left} of {now.circle.silos} silos are left and {least} are needed")
