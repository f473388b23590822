"""The training loop, the same for one client and for a cohort of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import nn

from fedllm.core.errors import Refused
from fedllm.core.seeds import derive
from fedllm.core.types import NOTHING, Dataset, Request, Silo, Tensors
from fedllm.silo.examples import Example, collate, draws
from fedllm.silo.inner import Inner, inner_optimiser, set_rate, what_to_keep
from fedllm.silo.objective import Objective
from fedllm.silo.sharded import ALONE, Part, own, part_of


class Settings(NamedTuple):
    """How a client trains; `local_training` says what each means."""

    steps: int | None
    epochs: float | None
    batch_size: int
    micro_batch: int
    rounds: int
    inner: Inner
    max_grad_norm: float
    proximal: float


class Fit(NamedTuple):
    """What training told: each member's mean loss a scored token, all tokens it read, and those that were scored."""

    loss_C: list[float]
    tokens_C: list[int]
    scored_C: list[int]
    kept: Tensors
    """The optimiser's state, if it is kept between rounds; moments have the dimension C where parameters do."""


def step_count(settings: Settings, data: Dataset) -> int:
    """Return the number of steps that a silo with this data takes in a round."""
    if settings.epochs is None:
        return settings.steps or 0
    return math.ceil(settings.epochs * len(data["train"]) / settings.batch_size)


def steps_taken(settings: Settings, request: Request, data: Dataset) -> int:
    """Return the number of steps that a silo takes for this request: fewer where it is told that it is `slow`.

    Raises:
        Refused: if it is told what is no slowness.
    """
    return slowed(step_count(settings, data), request.scalars.get("slow", 1.0))


def slowed(steps: int, slow: float) -> int:
    """Return how many of these steps a silo takes meanwhile that is so many times slower.

    >>> slowed(25, 5.0), slowed(3, 5.0)
    (5, 1)
    """
    if not 1 <= slow < math.inf:
        raise Refused(f"it is told to be {slow:g} times slower, which is no slowness")
    return max(min(steps, 1), int(steps / slow))


def fit(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    start: Tensors,
    members: Sequence[tuple[Request, Silo]],
    settings: Settings,
    objective: Objective,
    pad_id: int,
    kept: Tensors = NOTHING,
) -> Fit:
    """Train `params`, which hold `start`, in place for one round of the members, who all take as many steps.

    With C members each parameter has a leading dimension C and the rows of a batch are grouped by
    member; a single member's parameters may be the model's own. The members' losses are summed, so
    each one's gradient is exactly its own; clipping is per member. The optimiser goes on from what was `kept` of it.
    """
    device = next(iter(params.values())).device
    (request, silo), clients = members[0], len(members)
    steps, whole = steps_taken(settings, request, silo.data), step_count(settings, silo.data)
    first_step = request.round * whole
    streams = [
        draws(silo.data["train"], settings.batch_size, first_step, steps, derive(silo.seed, "order"))
        for request, silo in members
    ]
    part, optimiser = part_of(params), inner_optimiser(model, params, settings.inner, kept)
    loss_C = torch.zeros(clients, device=device)
    read, scored = [0] * clients, [0] * clients
    model.train()
    for step, drawn in enumerate(zip(*streams, strict=True), first_step):
        set_rate(optimiser, settings.inner, step, settings.rounds * whole)
        optimiser.zero_grad(set_to_none=True)
        now = [sum(label >= 0 for row in rows for label in row.labels[1:]) for rows in drawn]
        scored = [before + more for before, more in zip(scored, now, strict=True)]
        scored_C = torch.tensor(now, device=device)
        for rows, counts in passes(drawn, settings.micro_batch, part):
            batch = collate(rows, pad_id, device)
            each_C = objective(model, batch).view(clients, -1).sum(1) / scored_C * counts
            # Of gradients in several processes FSDP2 takes the mean, where their sum is due.
            (each_C.sum() * part.size).backward()
            loss_C += each_C.detach() / steps
        if settings.proximal:
            pull_back(params, start, settings.proximal)
        if settings.max_grad_norm:
            clip_each(params, clients, settings.max_grad_norm, part)
        optimiser.step()
        tokens = [sum(len(row.input_ids) for row in rows) for rows in drawn]
        read = [before + more for before, more in zip(read, tokens, strict=True)]
        for (_, silo), more in zip(members, tokens, strict=True):
            silo.tick(more)
    model.eval()
    return Fit(
        part.total(loss_C).tolist(), read, scored, what_to_keep(optimiser, params) if settings.inner.keep else {}
    )


def passes(drawn: Sequence[list[Example]], micro_batch: int, part: Part) -> Iterator[tuple[list[Example], int]]:
    """Yield the rows that this process computes of a batch, `micro_batch` of each member at a time; 0 if none counts.

    All processes make as many passes, since their layers come together in each: who has no row left takes one that does
    not count.
    """
    share = [member[part.rank :: part.size] for member in drawn]
    for first in range(0, -(-len(drawn[0]) // part.size), micro_batch):
        rows = [row for member in share for row in member[first : first + micro_batch]]
        yield rows or drawn[0][:1], int(bool(rows))


def pull_back(params: Mapping[str, nn.Parameter], start: Tensors, mu: float) -> None:
    """Add FedProx's mu * (w - w_t) to the gradients."""
    for name, value in params.items():
        if value.grad is not None:
            value.grad.add_(value.detach() - start[name], alpha=mu)


def clip_each(params: Mapping[str, nn.Parameter], clients: int, max_norm: float, part: Part = ALONE) -> None:
    """Scale each member's gradients down to an L2 norm of `max_norm` over all its parameters."""
    grads = [own(value.grad) for value in params.values() if value.grad is not None]
    norms = [torch.linalg.vector_norm(grad.reshape(clients, grad.numel() // clients), dim=1) for grad in grads]
    norm_C = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    if part.size > 1:
        norm_C = part.total(norm_C.square()).sqrt()
    scale_C = (max_norm / norm_C.clamp(min=1e-12)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale_C.view(clients, *[1] * (grad.dim() - 1)))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generators start from `seed` here and be as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
