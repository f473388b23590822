"""Send one fragment of the model a round, while every silo trains all of it.

Douillard et al., Streaming DiLoCo with overlapping communication, 2025 (arXiv:2501.18512), algorithm 2. One round here
is what lies between two fragments there: its H is `client.steps` times the number of fragments, and its tau is
`client.steps` times `delay`.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.tensors import below, subtract, under
from fedllm.core.types import Reply, Request, Share, Silo, State, Tensors, Work
from fedllm.exchange.layers import by_layer, by_pattern


class Begun(NamedTuple):
    """A client's round as it begins: what it trains from, what it measures its change against, and what it knows."""

    request: Request
    silo: Silo
    anchor: Tensors
    known: int


def fragments(
    count: int = 4,
    pattern: Literal["strided", "sequential"] = "strided",
    layers: Sequence[Sequence[int]] | None = None,
    embeddings: Literal["first", "apart"] = "first",
    delay: int = 0,
    mixing: float = 0.0,
    rounds: int | None = None,
) -> Share:
    """Share the layers in `count` fragments, one a round and in turn: every layer once in so many rounds.

    A fragment has every `count`-th layer (`strided`) or layers that follow each other (`sequential`), or `layers`
    lists those of each fragment. What belongs to no layer goes with the `first` fragment or is one more, `apart`.

    A silo trains all weights from those that it ended its last round with. In round r it replies g - w for one
    fragment, g being the value that it last received for it and w its own; the server steps. The new g is sent down
    `delay` rounds after the next request would have brought it, so that a round's training need not wait for the
    exchange of the one before, and is mixed in: w = mixing * w + (1 - mixing) * g. Between machines it does not wait:
    with a `delay` the next round's request is with the silo before this round's training ends. One whose reply is lost
    has then begun the next round from what it knew, and as no round is trained twice it misses that one too.
    A silo that comes late, or did not answer when it was last asked, is sent the whole model.

    Raises:
        FedllmError: now or when the plan is made, if a layer or the whole run would be left out.
    """
    size = (len(layers) if layers is not None else count) + (embeddings == "apart")
    groups = by_pattern(count, pattern, embeddings) if layers is None else by_layer(layers, embeddings)
    if count < 1 or not size:
        raise FedllmError("share has no fragment; set share.count to 1 or more, or name its layers in share.layers.")
    if not 0 <= delay < size:
        raise FedllmError(
            f"share.delay is {delay} but each fragment has its turn every {size} rounds; it must be at least 0 and "
            "below that."
        )
    if not 0 <= mixing < 1:
        raise FedllmError(f"share.mixing is {mixing:g}; it must be at least 0 and below 1.")
    if rounds is not None and rounds < size:
        raise FedllmError(
            f"The run has {rounds} rounds and share takes {size} until every layer has had its turn; set rounds to at "
            "least that, or share.count to less."
        )

    def decided(params: Tensors, after: int, until: int) -> dict[str, Tensor]:
        """Return those tensors of the fragments whose turn was in a round above `after` and up to `until`."""
        turns = {number % size for number in range(max(after + 1, until + 1 - size), until + 1)}
        place = groups(params)
        return {name: value for name, value in params.items() if place[name] in turns}

    def up(number: int, params: Tensors) -> Tensors:
        return decided(params, number - 1, number)

    def down(state: State, client: str) -> Tensors:
        known = below("share", state.transforms).get(client)
        return state.params if known is None else decided(state.params, int(known), state.round - 1 - delay)

    def note(state: State, asked: Sequence[str], answered: Set[str]) -> Tensors:
        before = below("share", state.transforms)
        kept = {name: value for name, value in before.items() if name not in asked}
        for name in sorted(answered):
            # With the whole model a silo has the outcome of all rounds, also of those that others wait for.
            late = 0 if down(state, name).keys() == state.params.keys() else delay
            until = state.round - 1 - late
            kept[name] = torch.tensor(max(until, int(before.get(name, until))))
        return kept

    def begin(request: Request, silo: Silo) -> Begun:
        memory, known = silo.memory, silo.memory.get("known")
        inner, sent = silo._replace(memory=below("inner", memory)), request.tensors
        if known is None:
            if sent.keys() != {name for name, value in silo.model.named_parameters() if value.requires_grad}:
                raise Refused("it remembers nothing of this run and was sent a part of the model; it is sent all next")
            return Begun(request, inner, {name: value.clone() for name, value in sent.items()}, request.round - 1)
        own, anchor = below("own", memory), below("anchor", memory)
        until = request.round - 1 - (0 if sent.keys() == own.keys() else delay)
        due = decided(own, int(known), until)
        if not due.keys() <= sent.keys():
            raise Refused("it remembers an earlier round than the server believes; it is sent the whole model next")
        # Copies, since they are remembered and what is sent may be what the server itself holds.
        come = {name: sent[name].clone() for name in due}
        start = {**own, **{name: mixed(own[name], value, mixing) for name, value in come.items()}}
        return Begun(request._replace(tensors=start), inner, {**anchor, **come}, max(int(known), until))

    def end(begun: Begun, reply: Reply, inner: Tensors) -> tuple[Reply, Tensors]:
        start, anchor = begun.request.tensors, begun.anchor
        # In this order: where training began at the anchor the reply is the update to the bit.
        part = up(begun.request.round, reply.tensors)
        sent = {name: (anchor[name] - start[name]) + value for name, value in part.items()}
        if not all(bool(value.isfinite().all()) for value in reply.tensors.values()):
            # Weights that are lost would spoil every round to come: the silo begins again from the whole model.
            return reply._replace(tensors=sent), {}
        own = subtract(start, {name: reply.tensors[name] for name in start})
        kept = {**under("own", own), **under("anchor", anchor), **under("inner", inner)}
        return reply._replace(tensors=sent), {**kept, "known": torch.tensor(begun.known)}

    def work(work: Work) -> Work:
        together = work.cohort

        def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
            begun = begin(request, silo)
            return end(begun, *work.client(begun.request, begun.silo))

        def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
            assert together is not None
            begun = [begin(*member) for member in members]
            answers = together([(each.request, each.silo) for each in begun])
            return [end(each, *answer) for each, answer in zip(begun, answers, strict=True)]

        return work._replace(client=client, cohort=cohort if together else None)

    def settled(number: int) -> bool:
        return delay > 0 and (rounds is None or number + 1 < rounds)

    name = f"{size} fragments{f', {delay} late, mixed by {mixing:g}' if delay else ''}"
    return Share(name, down, up, size, work, note, settled=settled)


def mixed(own: Tensor, come: Tensor, mixing: float) -> Tensor:
    """Return mixing * own + (1 - mixing) * come, and nothing of the own at 0."""
    return own * mixing + come * (1 - mixing) if mixing else come
