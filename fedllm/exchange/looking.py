"""A silo's held-out loss on the weights that it begins a round with, beside its update: for sums, which hide it."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.core.types import Client, Reply, Request, Silo, Tensors, Work

LOSS = "held_out_loss"
"""In the reply to training; what of it a sum may tell are the three below, of all its silos together."""

TOTAL, COUNT, BEYOND = "held_out_total", "held_out_count", "held_out_beyond"
"""The sum of the losses, of how many silos, and how many of these lost more than is counted."""


def looking(work: Work, evaluator: Client, every: int) -> Work:
    """Let a client tell its held-out loss on what it begins with, in every so many rounds, if it can be measured."""

    def seen(request: Request, silo: Silo) -> dict[str, float]:
        if request.op != "train" or request.round % every:
            return {}
        told, _ = evaluator(Request(request.client, request.round, "evaluate", request.tensors), silo)
        return {LOSS: told.scalars["loss"]} if "loss" in told.scalars else {}

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        loss = seen(request, silo)
        reply, memory = work.client(request, silo)
        return reply._replace(scalars={**reply.scalars, **loss}), memory

    def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        assert work.cohort is not None
        losses = [seen(*member) for member in members]
        return [
            (reply._replace(scalars={**reply.scalars, **loss}), memory)
            for loss, (reply, memory) in zip(losses, work.cohort(members), strict=True)
        ]

    return work._replace(client=client, cohort=cohort if work.cohort else None)
