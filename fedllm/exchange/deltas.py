"""Send the silos what changed in the model, in whole numbers of few bits, in place of the model.

Both directions compressed with a memory of the error, as in DoubleSqueeze (Tang et al. 2019, arXiv:1905.05957). There
the server keeps the error of what it sent and adds it to the next; here it keeps the copy of the model that the silos
hold and sends the difference from it, which is the same sum, and lets a silo that was away be sent that copy whole.
"""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Literal

import torch

from fedllm.core.errors import Refused
from fedllm.core.tensors import below, subtract, under
from fedllm.core.types import Reply, Request, Share, Silo, State, Tensors, Work
from fedllm.exchange.quantise import quantise


def deltas(bits: Literal[4, 8] = 4, block: int = 64) -> Share:
    """Share all parameters; a silo that answered in the last round is sent only their change, rounded to `bits` bits.

    With x the server's parameters and y the silos' copy: send C(x - y), y = y + C(x - y) at both ends. What rounding
    took away stays in x - y and is sent later. A silo trains from y and replies y - end; the server steps from x. Any
    other silo is sent y whole, as all are in the first round, where y = x: this saves where most silos take part in
    most rounds. Server and silos each keep one more copy of the model.
    """
    packer = quantise(bits, block, error_feedback=False)
    last: list[tuple[State, Tensors, Tensors]] = []

    def news(state: State) -> tuple[Tensors, Tensors]:
        """Return the change that is sent in a round, and the silos' copy with it."""
        held = below("held", below("share", state.transforms))
        if not held:
            return {}, state.params
        # Every silo of a round is told the same, so it is made once.
        if not last or last[0][0] is not state:
            packed, _ = packer.encode(subtract(state.params, held), {}, 0)
            last[:] = [(state, packed, moved(held, packed))]
        return last[0][1:]

    def moved(held: Tensors, packed: Tensors) -> dict[str, torch.Tensor]:
        change = packer.decode(packed, held)
        return {name: value + change[name] for name, value in held.items()}

    def down(state: State, client: str) -> Tensors:
        packed, held = news(state)
        known = below("known", below("share", state.transforms)).get(client)
        return packed if known is not None and int(known) == state.round - 1 else held

    def note(state: State, asked: Sequence[str], answered: Set[str]) -> Tensors:
        _, held = news(state)
        last.clear()
        known = {name: torch.tensor(state.round) for name in sorted(answered)}
        return {**under("held", held), **under("known", known)}

    def begin(request: Request, silo: Silo) -> tuple[Request, Silo]:
        inner, sent = silo._replace(memory=below("inner", silo.memory)), request.tensors
        if sent.keys() != {name for name, value in silo.model.named_parameters() if value.requires_grad}:
            held, known = below("held", silo.memory), silo.memory.get("known")
            if known is None or int(known) != request.round - 1:
                raise Refused("it was sent a change to weights that it does not hold; it is sent the whole model next")
            sent = moved(held, {name: value.to(next(iter(held.values())).device) for name, value in sent.items()})
        return request._replace(tensors=sent), inner

    def end(request: Request, reply: Reply, inner: Tensors) -> tuple[Reply, Tensors]:
        # Copies, since what is sent may be what the server itself holds.
        held = {name: value.clone() for name, value in request.tensors.items()}
        return reply, {**under("held", held), **under("inner", inner), "known": torch.tensor(request.round)}

    def work(work: Work) -> Work:
        together = work.cohort

        def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
            begun, inner = begin(request, silo)
            return end(begun, *work.client(begun, inner))

        def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
            assert together is not None
            begun = [begin(*member) for member in members]
            return [end(request, *answer) for (request, _), answer in zip(begun, together(begun), strict=True)]

        return work._replace(client=client, cohort=cohort if together else None)

    def packed(params: Tensors) -> Tensors:
        return packer.encode(params, {}, 0)[0]

    return Share(f"changes in int{bits}", down, work=work, note=note, packed=packed)
