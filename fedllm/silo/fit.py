"""The training loop, the same for one client and for a cohort of them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.core.seeds import derive
from fedllm.core.types import Dataset, Request, Silo, Tensors
from fedllm.silo.examples import collate, draws
from fedllm.silo.objective import Objective


class Settings(NamedTuple):
    """How a client trains; `local_training` says what each means."""

    steps: int | None
    epochs: float | None
    batch_size: int
    micro_batch: int
    learning_rate: float
    weight_decay: float
    optimiser: Literal["adamw", "sgd"]
    max_grad_norm: float
    proximal: float


class Fit(NamedTuple):
    """What training told: each member's mean loss a scored token, and all tokens it read."""

    loss_C: list[float]
    tokens_C: list[int]


def step_count(settings: Settings, data: Dataset) -> int:
    """Return the number of steps that a silo with this data takes in a round."""
    if settings.epochs is None:
        return settings.steps or 0
    return math.ceil(settings.epochs * len(data["train"]) / settings.batch_size)


def fit(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    start: Tensors,
    members: Sequence[tuple[Request, Silo]],
    settings: Settings,
    objective: Objective,
    pad_id: int,
) -> Fit:
    """Train `params`, which hold `start`, in place for one round of the members, who all take as many steps.

    With C members each parameter has a leading dimension C and the rows of a batch are grouped by
    member; a single member's parameters may be the model's own. The members' losses are summed, so
    each one's gradient is exactly its own; clipping is per member.
    """
    device = next(iter(params.values())).device
    steps, clients = step_count(settings, members[0][1].data), len(members)
    streams = [
        draws(silo.data["train"], settings.batch_size, request.round * steps, steps, derive(silo.seed, "order"))
        for request, silo in members
    ]
    optimiser = inner_optimiser(params, settings)
    loss_C = torch.zeros(clients, device=device)
    read = [0] * clients
    model.train()
    for drawn in zip(*streams, strict=True):
        optimiser.zero_grad(set_to_none=True)
        scored_C = torch.tensor(
            [sum(label >= 0 for row in rows for label in row.labels[1:]) for rows in drawn], device=device
        )
        for first in range(0, settings.batch_size, settings.micro_batch):
            rows = [row for member in drawn for row in member[first : first + settings.micro_batch]]
            batch = collate(rows, pad_id, device)
            each_C = objective(model, batch).view(clients, -1).sum(1) / scored_C
            each_C.sum().backward()
            loss_C += each_C.detach() / steps
        if settings.proximal:
            pull_back(params, start, settings.proximal)
        if settings.max_grad_norm:
            clip_each(params, clients, settings.max_grad_norm)
        optimiser.step()
        tokens = [sum(len(row.input_ids) for row in rows) for rows in drawn]
        read = [before + now for before, now in zip(read, tokens, strict=True)]
        for (_, silo), now in zip(members, tokens, strict=True):
            silo.tick(now)
    model.eval()
    return Fit(loss_C.tolist(), read)


def inner_optimiser(params: Mapping[str, nn.Parameter], settings: Settings) -> torch.optim.Optimizer:
    """Return a fresh optimiser over the parameters."""
    values = list(params.values())
    if settings.optimiser == "sgd":
        return torch.optim.SGD(values, settings.learning_rate, weight_decay=settings.weight_decay)
    return torch.optim.AdamW(
        values,
        settings.learning_rate,
        weight_decay=settings.weight_decay,
        fused=values[0].device.type != "mps",
    )


def pull_back(params: Mapping[str, nn.Parameter], start: Tensors, mu: float) -> None:
    """Add FedProx's mu * (w - w_t) to the gradients."""
    for name, value in params.items():
        if value.grad is not None:
            value.grad.add_(value.detach() - start[name], alpha=mu)


def clip_each(params: Mapping[str, nn.Parameter], clients: int, max_norm: float) -> None:
    """Scale each member's gradients down to an L2 norm of `max_norm` over all its parameters."""
    grads = [value.grad for value in params.values() if value.grad is not None]
    norms = [torch.linalg.vector_norm(grad.reshape(clients, -1), dim=1) for grad in grads]
    norm_C = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale_C = (max_norm / norm_C.clamp(min=1e-12)).clamp(max=1.0)
    for grad in grads:
        grad.mul_(scale_C.view(clients, *[1] * (grad.dim() - 1)))


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Let torch's global generators start from `seed` here and be as before afterwards."""
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield


def stack(tensors: Sequence[Tensors], device: torch.device) -> dict[str, Tensor]:
    """Stack the members' tensors along a new first dimension C."""
    return {name: torch.stack([each[name].to(device) for each in tensors]) for name in tensors[0]}
