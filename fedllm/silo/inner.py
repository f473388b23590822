"""The optimiser of local training: its settings, its learning rate over the run, and what it keeps between rounds."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

from fedllm.core.schedule import Schedule, factor
from fedllm.core.tensors import below
from fedllm.core.types import Tensors
from fedllm.silo.muon import Muon, inner_matrices
from fedllm.silo.sharded import spread

InnerName: TypeAlias = Literal["adamw", "sgd", "muon"]


class Inner(NamedTuple):
    """How a client steps; `local_training` says what each means."""

    name: InnerName
    learning_rate: float
    betas: tuple[float, float]
    weight_decay: float
    schedule: Schedule
    keep: bool


def inner_optimiser(
    model: nn.Module, params: Mapping[str, nn.Parameter], inner: Inner, kept: Tensors
) -> torch.optim.Optimizer:
    """Return an optimiser over parameters of the model that goes on from what was `kept` of it, or a fresh one."""
    values = list(params.values())
    if inner.name == "sgd":
        return torch.optim.SGD(values, inner.learning_rate, weight_decay=inner.weight_decay)
    settings: dict[str, Any] = {
        "lr": inner.learning_rate,
        "betas": inner.betas,
        "weight_decay": inner.weight_decay,
        "fused": values[0].device.type != "mps",
    }
    optimiser = (
        Muon(values, list(inner_matrices(model, params).values()), **settings)
        if inner.name == "muon"
        else torch.optim.AdamW(values, **settings)
    )
    if kept:
        # Copies, since steps are taken in place and what a silo remembers must not change under it.
        known = {
            place: {key: (spread(own, value) if own.dim() else own).clone() for key, own in of(name, kept)}
            for place, (name, value) in enumerate(params.items())
        }
        state = {place: each for place, each in known.items() if each}
        optimiser.load_state_dict({"state": state, "param_groups": optimiser.state_dict()["param_groups"]})
    return optimiser


def of(name: str, kept: Tensors) -> list[tuple[str, Tensor]]:
    """Return what was kept of one parameter: `exp_avg`, `exp_avg_sq` and `step`."""
    return [(key, kept[f"{key}/{name}"]) for key in ("step", "exp_avg", "exp_avg_sq") if f"{key}/{name}" in kept]


def what_to_keep(optimiser: torch.optim.Optimizer, params: Mapping[str, nn.Parameter]) -> dict[str, Tensor]:
    """Return the state of an optimiser as `KEY/NAME` -> tensor: moments like the parameter, and the count of steps."""
    return {f"{key}/{name}": own for name, value in params.items() for key, own in optimiser.state[value].items()}


def sound(kept: Tensors) -> Tensors:
    """Return what was kept, or nothing if a moment is not finite: it would spoil every round to come."""
    return kept if all(bool(own.isfinite().all()) for own in kept.values()) else {}


def set_rate(optimiser: torch.optim.Optimizer, inner: Inner, step: int, total: int) -> None:
    """Set the learning rate for a step of the run, counted from 0, of `total`."""
    for group in optimiser.param_groups:
        group["lr"] = inner.learning_rate * factor(inner.schedule, step, total)


def steps_made(kept: Tensors) -> tuple[float, ...]:
    """Return how many steps the moments stand for: only such with equal numbers fit into one batch."""
    return tuple(value.item() for value in below("step", kept).values())


def stack_kept(each: Sequence[Tensors]) -> dict[str, Tensor]:
    """Stack the moments of members that made as many steps along a new first dimension C."""
    return {
        name: value if name.startswith("step/") else torch.stack([kept[name] for kept in each])
        for name, value in each[0].items()
    }


def kept_of(kept: Tensors, place: int) -> dict[str, Tensor]:
    """Return one member's part of what was kept of a batch."""
    return {name: (value if name.startswith("step/") else value[place]).clone() for name, value in kept.items()}
