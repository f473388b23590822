"""What a silo trains but does not send: it stays in the silo's memory from round to round."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from fedllm.core.tensors import below, subtract, under
from fedllm.core.types import Reply, Request, Silo, Tensors, Work

OWN = "personal"
"""The part of a silo's memory that holds what it trains and does not send."""


def keeping(work: Work, first: Tensors) -> Work:
    """Let a client train all of `first` by name, and send only what its request carried.

    The rest goes on from what the silo remembers of it, or from `first`. All that it trained is remembered, since the
    next request may carry other names. Nothing of the rest is in the reply, whatever `work` does.
    """
    together = work.cohort

    def begin(request: Request, silo: Silo) -> tuple[Request, Silo]:
        start = {**first, **below("sent", silo.memory), **below(OWN, silo.memory), **request.tensors}
        whole = {name: start[name] for name in first}
        return request._replace(tensors=whole), silo._replace(memory=below("inner", silo.memory))

    def end(asked: Request, whole: Request, reply: Reply, inner: Tensors) -> tuple[Reply, Tensors]:
        shared = {name: reply.tensors[name] for name in whole.tensors if name in asked.tensors}
        if not all(bool(value.isfinite().all()) for value in reply.tensors.values()):
            # What is lost would spoil every round to come: the silo begins again.
            return reply._replace(tensors=shared), {}
        ended = {name: value.clone() for name, value in subtract(whole.tensors, reply.tensors).items()}
        own = {name: value for name, value in ended.items() if name not in shared}
        sent = {name: value for name, value in ended.items() if name in shared}
        return reply._replace(tensors=shared), {**under(OWN, own), **under("sent", sent), **under("inner", inner)}

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        whole, inside = begin(request, silo)
        return end(request, whole, *work.client(whole, inside))

    def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        assert together is not None
        begun = [begin(*member) for member in members]
        answers = together(begun)
        return [
            end(asked, whole, *answer) for (asked, _), (whole, _), answer in zip(members, begun, answers, strict=True)
        ]

    return work._replace(client=client, cohort=cohort if together else None)


def own_of(memory: Tensors) -> dict[str, Tensor]:
    """Return what a silo remembers of its own, by name, however deep other parts of a round put it.

    >>> import torch
    >>> list(own_of({"work/personal/a": torch.zeros(1), "work/sent/b": torch.zeros(1)}))
    ['a']
    """
    mark = f"{OWN}/"
    found = {}
    for key, value in memory.items():
        before, here, name = key.partition(mark)
        if here and (not before or before.endswith("/")):
            found[name] = value
    return found
