"""One round for all: most federated algorithms are one call of `averaging` with a part or two of their own.

select - share -> [ exchange: client work - encode... ] - ...decode - aggregate - finish... - optimiser -> next state
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from functools import lru_cache, partial

import torch
from torch import Tensor

from fedllm.core import by_tensor
from fedllm.core.asking import asking
from fedllm.core.by_tensor import parts, patient, step, those_aside_last
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.optimisers import fedavg
from fedllm.core.seeds import derive
from fedllm.core.tensors import below, quick_norm, require_like, require_shapes, under
from fedllm.core.types import (
    Aggregator,
    Algorithm,
    Aside,
    Claim,
    Client,
    Cohort,
    Cut,
    Exchange,
    Facts,
    Middleware,
    Probe,
    Reply,
    Report,
    Request,
    Select,
    ServerOptimizer,
    Share,
    Silo,
    State,
    Step,
    Tensors,
    Transform,
    Work,
    as_it_is,
    on_meta,
)

LARGEST_WEIGHT = 2.0**53
"""More examples than this nobody has; a weight that overflows would spoil the mean of all."""


def everything() -> Share:
    """Share all parameters with every selected client, and take all of them back."""
    return Share("")


def averaging(
    *,
    work: Work,
    select: Select,
    aggregate: Aggregator,
    optimiser: ServerOptimizer | None = None,
    share: Share | None = None,
    transforms: Sequence[Transform] = (),
    middleware: Sequence[Middleware] = (),
    probes: Sequence[Probe] = (),
) -> Algorithm:
    """Build the algorithm that averages what its clients changed.

    The client replies start - end, which `transforms` encode in order and the server decodes in
    reverse; the first middleware is the outermost. A reply that is not finite or has the wrong
    names, shapes or dtypes is dropped and counted.

    Raises:
        FedllmError: from the round, when clients were asked and no reply could be used, unless a middleware lost all.
    """
    optimiser, share = optimiser or fedavg(), share or everything()
    work, fold = share.work(work), patient(aggregate)

    def init(params: Tensors) -> State:
        return State(0, dict(params), dict(optimiser.init(params)), {})

    def settled(number: int) -> bool:
        # A layer between may ask for more than one message a round, so it has every round to itself.
        return share.settled(number) and not middleware

    def server(state: State, exchange: Exchange) -> tuple[State, Report]:
        like = share.up(state.round, state.params)
        stages = wire_stages(transforms, like)
        labels = [f"{place}.{transform.name}" for place, transform in enumerate(transforms)]
        now = [
            in_round(transform, state.round, below(label, state.transforms))
            for label, transform in zip(labels, transforms, strict=True)
        ]
        always = any(transform.always for transform in transforms)
        asked = list(select(state.round))
        following = select(state.round + 1) if settled(state.round) else ()
        requests = asking(share, state, asked, following)
        for layer in reversed(middleware):
            exchange = layer.exchange(exchange)

        total, looks = fold.zero(like), [probe.zero(like) for probe in probes]
        waiting, weight, report, heard = set(asked), 0.0, dict[str, float | str](), False
        unsummed: Mapping[str, str] = {}

        def taken(reply: Reply) -> Tensors | None:
            nonlocal heard, unsummed, waiting
            heard, unsummed = True, {**unsummed, **reply.lost}
            if reply.lost and not reply.of:
                return None
            members = set(reply.of) or {reply.client}
            try:
                update = accept(reply, state.round, waiting, now, stages)
            except Refused as problem:
                report.update({f"dropped.{name}": str(problem) for name in members})
                return None
            waiting -= members
            return update

        replies = exchange(requests) if requests else iter(())
        for reply, update in those_aside_last(replies, taken):
            total = fold.add(total, update, reply.weight)
            looks = [probe.add(look, update, reply.weight) for probe, look in zip(probes, looks, strict=True)]
            weight += reply.weight
            report |= {f"{key}.{reply.client}": value for key, value in reply.scalars.items()}
            # The next reply is on its way: of two large ones only one should be in memory.
            del reply, update

        answered = len(asked) - len(waiting)
        lost = {name: unsummed[name] for name in asked if name in unsummed}
        lost |= {name: why for name in asked for layer in middleware if (why := layer.lost(state.round, name))}
        for name in sorted(waiting - {key.removeprefix("dropped.") for key in report}):
            report[f"dropped.{name}"] = lost.get(name, "no reply")
        report |= {"clients": answered, "asked": len(asked)}
        if not answered and waiting - lost.keys() and not (always and heard):
            raise FedllmError(no_update_message(state.round, report))
        memory = {name: value for name, value in state.transforms.items() if not name.startswith("share/")}
        memory |= under("share", share.note(state, asked, set(asked) - waiting))
        if not answered and not always:
            return state._replace(round=state.round + 1, transforms=memory), report

        mean = fold.done(total) if answered else {name: torch.zeros_like(value) for name, value in like.items()}
        # The sum is the largest thing that a server holds, and the others have tensors that the step replaces.
        del total, like, requests

        def finish(mean: Tensors) -> Tensors:
            for label, transform in reversed(list(zip(labels, now, strict=True))):
                mean, kept = transform.finish(mean, below(label, memory), Cut(state.round, answered, weight))
                memory.update(under(label, kept))
            return mean

        params, optimiser_state = step(optimiser, mean, state, finish)
        for probe, look in zip(probes, looks, strict=True):
            report |= probe.done(look)
        return State(state.round + 1, params, optimiser_state, memory), report

    client = encoding(work.client, transforms)
    cohort = encoding_cohort(work.cohort, transforms) if work.cohort else None
    for layer in reversed(middleware):
        if layer.client:
            # A client half may send messages of its own, which a batch of clients cannot unless it knows them.
            client, cohort = layer.client(client), layer.cohort(cohort) if cohort and layer.cohort else None
    steps = [
        Step("server", f"select and share{': ' * bool(share.name)}{share.name}"),
        Step("silo", "local training", work.claim),
        *(Step("silo", f"encode: {t.name}", t.claim) for t in transforms),
        *(Step("wire", m.name, m.claim) for m in middleware),
        *(Step("server", f"decode: {t.name}", decoded(t)) for t in reversed(transforms)),
        *(Step("server", f"look: {p.name}", p.claim) for p in probes),
        Step("server", f"aggregate: {aggregate.name}", aggregate.claim),
        *(
            Step("server", f"finish: {t.name}", t.finished)
            for t in reversed(transforms)
            if t.always or t.finish is not as_it_is
        ),
        Step("server", f"step: {optimiser.name}"),
    ]

    def wire(like: Tensors) -> Tensors:
        sent = largest(wire_stages(transforms, part)[-1] for part in parts_of(share, like))
        for layer in reversed(middleware):
            sent = layer.wire(sent)
        return sent

    def down(like: Tensors) -> Tensors:
        return share.packed(largest(parts_of(share, like)))

    ops = ["train", *(op for layer in middleware for op in layer.ops)]
    whole = Algorithm(init, client, server, cohort, steps, wire, down, ops, ahead=settled(0))

    def reached(number: int) -> list[str]:
        return [name for name in select(number) if not any(layer.lost(number, name) for layer in middleware)]

    return share.around(whole, reached)


def decoded(transform: Transform) -> Claim:
    """Return what is known after `decode`, or refuse it where the server sees only sums of what was encoded."""

    def claim(facts: Facts) -> Facts:
        if facts.sees != "each" and not transform.summable:
            raise FedllmError(
                f"transforms: '{transform.name}' has to be undone for each silo's reply, and the server sees only sums "
                "of them; take it out, or take out [secure] or [homomorphic]."
            )
        return transform.decoded(facts)

    return claim


def parts_of(share: Share, like: Tensors) -> Iterator[Tensors]:
    """Yield what comes back in each round until the parts come round again."""
    return (share.up(number, like) for number in range(share.period))


def largest(each: Iterable[Tensors]) -> Tensors:
    """Return those of the tensors that have the most bytes."""
    return max(each, key=lambda tensors: sum(value.nbytes for value in tensors.values()))


def wire_stages(transforms: Sequence[Transform], like: Tensors) -> list[Tensors]:
    """Return on the meta device what the update looks like before and after each transform."""
    stages: list[Tensors] = [on_meta(like)]
    for transform in transforms:
        stages.append(transform.encode(stages[-1], {}, 0)[0])
    return stages


@lru_cache(maxsize=4096)
def stages_alone(
    transforms: tuple[Transform, ...], name: str, shape: torch.Size, dtype: torch.dtype
) -> Sequence[Tensors]:
    """Return the stages of one tensor; every tensor of every reply asks for them."""
    return wire_stages(transforms, {name: torch.empty(shape, dtype=dtype, device="meta")})


def accept(
    reply: Reply,
    round_number: int,
    waiting: set[str],
    transforms: Sequence[Transform],
    stages: Sequence[Tensors],
) -> Tensors:
    """Return the decoded update of a reply, or raise `Refused`; nothing in a reply is trusted.

    What lies outside of memory stays there, unless a transform needs more of it at once than a tensor.
    """
    if not set(reply.of or [reply.client]) <= waiting:
        raise Refused("it was not asked, or has answered already")
    if reply.round != round_number:
        raise Refused(f"it answers round {reply.round}, not {round_number}")
    if not 0 < reply.weight <= LARGEST_WEIGHT:
        raise Refused(f"its weight is {reply.weight}")
    for key, value in reply.scalars.items():
        if not math.isfinite(value):
            raise Refused(f"its '{key}' is {value}")
    if isinstance(reply.tensors, Aside) and apart(transforms):
        return decoded_aside(reply.tensors, reply, transforms, stages)
    return decode_all(dict(reply.tensors), transforms, stages)


def apart(transforms: Sequence[Transform]) -> bool:
    """Return whether what came can be decoded, and the aggregate finished, tensor by tensor."""
    return all(transform.apart for transform in transforms)


def decode_all(sent: Tensors, transforms: Sequence[Transform], stages: Sequence[Tensors]) -> Tensors:
    """Return the update that was sent, or raise `Refused`."""
    require_like(sent, stages[-1])
    # Sums over all tensors need one order, to the last bit; a wire has its own.
    update = undone({name: sent[name] for name in stages[-1]}, transforms, stages)
    if transforms:
        require_like(update, stages[0])
    return update


def undone(update: Tensors, transforms: Sequence[Transform], stages: Sequence[Tensors]) -> Tensors:
    """Return what was sent without the transforms."""
    for transform, like in zip(reversed(transforms), reversed(stages[:-1]), strict=True):
        update = transform.decode(update, like)
    return update


def decoded_aside(sent: Aside, reply: Reply, transforms: Sequence[Transform], stages: Sequence[Tensors]) -> Aside:
    """Return the update that was sent, which stays where it is, or raise `Refused`; every tensor is looked at."""
    require_shapes(sent.like, stages[-1])

    def read(name: str) -> Tensor:
        own = stages_alone(tuple(transforms), name, stages[0][name].shape, stages[0][name].dtype)
        return decode_all({each: sent[each] for each in own[-1]}, transforms, own)[name]

    def part(name: str, start: int, stop: int) -> Tensor:
        assert sent.cut is not None
        own = stages_alone(tuple(transforms), name, torch.Size([stop - start]), stages[0][name].dtype)
        return undone({each: sent.cut(each, start, stop) for each in own[-1]}, transforms, own)[name]

    def cut(name: str, start: int, stop: int) -> Tensor:
        value = part(name, start, stop)
        if not quick_norm(value).isfinite():
            require_like({name: value}, {name: value})
        return value

    def again(read: Callable[..., Tensor], *where: str | int) -> Tensor:
        try:
            return read(*where)
        except Refused as problem:
            # Other tensors of it may be in the parameters by now.
            raise FedllmError(
                f"Round {reply.round + 1} ended while it was added up: the reply of '{reply.client}' is not what it "
                f"was ({problem}); see that the disk it waits on is sound, then resume the run."
            ) from problem

    in_parts = sent.cut and all(transform.by_value for transform in transforms)
    for name, like in stages[0].items():
        if in_parts and like.is_floating_point():
            norms = [quick_norm(part(name, *where)) for where in parts(like.numel(), by_tensor.PART)]
            if bool(torch.linalg.vector_norm(torch.stack(norms).float()).isfinite()):
                continue
        read(name)
    return Aside(stages[0], partial(again, read), partial(again, cut) if in_parts else None)


def in_round(transform: Transform, number: int, memory: Tensors) -> Transform:
    """Return a transform as it is in one round for who remembers this."""
    return transform.at(number, memory) if transform.at else transform


def encode_all(reply: Reply, memory: Tensors, silo: Silo, transforms: Sequence[Transform]) -> tuple[Reply, Tensors]:
    """Pass a client's update through the transforms, each with its own part of the silo's memory."""
    kept, update = under("work", memory), reply.tensors
    for place, transform in enumerate(transforms):
        label = f"{place}.{transform.name}"
        seed = derive(silo.seed, "encode", reply.round, place)
        held = below(label, silo.memory)
        update, own = in_round(transform, reply.round, held).encode(update, held, seed)
        kept |= under(label, own)
    return reply._replace(tensors=update), kept


def encoding(client: Client, transforms: Sequence[Transform]) -> Client:
    """Let a client encode what it replies."""

    def encoded(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        reply, memory = client(request, silo._replace(memory=below("work", silo.memory)))
        return encode_all(reply, memory, silo, transforms)

    return encoded


def encoding_cohort(cohort: Cohort, transforms: Sequence[Transform]) -> Cohort:
    """Let every client of a batch encode what it replies."""

    def encoded(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        bare = [(request, silo._replace(memory=below("work", silo.memory))) for request, silo in members]
        return [
            encode_all(reply, memory, silo, transforms)
            for (reply, memory), (_, silo) in zip(cohort(bare), members, strict=True)
        ]

    return encoded


def no_update_message(round_number: int, report: Report) -> str:
    """Name the silos whose updates were dropped and what to do."""
    reasons = "; ".join(
        f"{key.removeprefix('dropped.')}: {value}" for key, value in report.items() if key.startswith("dropped.")
    )
    return (
        f"Round {round_number + 1} has no usable update ({reasons}); if they are not finite, lower "
        "client.learning_rate or set client.max_grad_norm, then resume."
    )
