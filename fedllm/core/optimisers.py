"""Server optimisers: the aggregate of (start - end) is a pseudo-gradient.

Reddi et al., Adaptive Federated Optimization, 2021 (arXiv:2003.00295), algorithm 2, from which the
adaptive ones differ only in the line for v; there Delta = -(start - end), hence the minus signs
here. As in the paper there is no bias correction and v starts at tau squared.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.room import room_for
from fedllm.core.schedule import Schedule, Shape, factor, require_schedule
from fedllm.core.tensors import below, under
from fedllm.core.types import ServerOptimizer, Tensors


def fedavg(learning_rate: float = 1.0) -> ServerOptimizer:
    """FedAvg (McMahan et al. 2017): params -= learning_rate * mean; at 1.0 the plain average of the clients."""

    def step(params: Tensors, mean: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        moved = {name: params[name] - learning_rate * value for name, value in mean.items()}
        return {**params, **moved}, state

    return ServerOptimizer(f"FedAvg(lr {learning_rate:g})", lambda params: {}, step)


def fedavgm(learning_rate: float = 1.0, momentum: float = 0.9) -> ServerOptimizer:
    """FedAvgM (Hsu et al. 2019, arXiv:1909.06335): m = momentum * m + mean; params -= learning_rate * m."""

    def init(params: Tensors) -> Tensors:
        return {name: room_for(value).zero_() for name, value in params.items()}

    def step(params: Tensors, mean: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        speed = {name: momentum * state[name] + value for name, value in mean.items()}
        moved = {name: params[name] - learning_rate * value for name, value in speed.items()}
        return {**params, **moved}, {**state, **speed}

    return ServerOptimizer(f"FedAvgM(lr {learning_rate:g}, momentum {momentum:g})", init, step)


def outer_momentum(rounds: int | None) -> float:
    """Return the outer momentum for a run of so many rounds: from plain averaging to DiLoCo's value.

    Momentum has to settle before the run ends. In runs from nothing (`benchmarks/pretrain_sweep.py`) every one that was
    tried lost to plain averaging in 27 rounds, and in 96 rounds 0.6, at a rate of 1 that rises over the first tenth,
    won with two silos and with eight. So it is 0 up to 54 rounds, 0.6 from 96 on, and DiLoCo's 0.9 from 3,000 on;
    what lies between was not measured.

    >>> [round(outer_momentum(rounds), 2) for rounds in (54, 75, 96, 750, 1500, 3000, 5000)]
    [0.0, 0.3, 0.6, 0.6, 0.8, 0.9, 0.9]
    """
    if rounds is None:
        return 0.9
    early = min(max((rounds - 54) / (96 - 54), 0.0), 1.0) * 0.6
    return max(early, min(0.9, 1 - 300 / rounds)) if rounds > 54 else 0.0


def nesterov(
    learning_rate: float | None = None,
    momentum: float | None = None,
    warmup: float | None = None,
    schedule: Shape = "constant",
    floor: float = 0.0,
    rounds: int | None = None,
) -> ServerOptimizer:
    """DiLoCo's outer step (Douillard et al. 2023, arXiv:2311.08105, algorithm 1, line 14): SGD with Nesterov momentum.

    As `torch.optim.SGD(nesterov=True)`, to the bit: m = momentum * m + mean; params -= learning_rate * (mean +
    momentum * m). The learning rate rises over the first `warmup` rounds (below 1: that share of all `rounds`), then
    is `constant` or falls, `linear` or as a `cosine`, to `floor` times itself over all `rounds`. In the long run each
    mean moves the parameters by learning_rate / (1 - momentum) times itself, 7 times with DiLoCo's values; a run of few
    rounds ends before they have moved that far, so momentum follows from `rounds` where it is not given
    (`outer_momentum`), with a `warmup` over a tenth of them, and the rate from the momentum: 1 up to 0.6, then less,
    which is DiLoCo's 0.7 for 0.9.
    """
    if warmup is None:
        warmup = 0.1 if momentum is None and rounds and outer_momentum(rounds) else 0.0
    momentum = outer_momentum(rounds) if momentum is None else momentum
    learning_rate = min(1.0, 0.7 + (0.9 - momentum)) if learning_rate is None else learning_rate
    if learning_rate <= 0:
        raise FedllmError(f"optimiser.learning_rate is {learning_rate:g}; it must be above 0.")
    if not 0 <= momentum < 1:
        raise FedllmError(f"optimiser.momentum is {momentum:g}; it must be at least 0 and below 1.")
    over = Schedule(schedule, warmup, floor)
    require_schedule("optimiser", over, rounds)

    def init(params: Tensors) -> Tensors:
        moments = {name: room_for(value).zero_() for name, value in params.items()}
        return {**under("momentum", moments), "step": torch.zeros((), dtype=torch.int64)}

    def step(params: Tensors, mean: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        rate = learning_rate * factor(over, int(state["step"]), rounds or 0)
        moments = {name: state[f"momentum/{name}"].mul(momentum).add_(value) for name, value in mean.items()}
        moved = {
            name: params[name].add(value.add(moments[name], alpha=momentum), alpha=-rate)
            for name, value in mean.items()
        }
        return {**params, **moved}, {**state, **under("momentum", moments), "step": state["step"] + 1}

    return ServerOptimizer(f"Nesterov(lr {learning_rate:g}, momentum {momentum:g})", init, step)


def adaptive(
    name: str,
    second_moment: Callable[[Tensor, Tensor], Tensor],
    learning_rate: float,
    beta1: float,
    tau: float,
) -> ServerOptimizer:
    """Build the common part: m = beta1 m + (1 - beta1) g; params -= learning_rate * m / (sqrt(v) + tau)."""

    def init(params: Tensors) -> Tensors:
        m = {key: room_for(value).zero_() for key, value in params.items()}
        v = {key: room_for(value).fill_(tau**2) for key, value in params.items()}
        return {**under("m", m), **under("v", v)}

    def step(params: Tensors, mean: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        old_m, old_v = below("m", state), below("v", state)
        m = {key: beta1 * old_m[key] + (1 - beta1) * g for key, g in mean.items()}
        v = {key: second_moment(old_v[key], g.square()) for key, g in mean.items()}
        moved = {key: params[key] - learning_rate * m[key] / (v[key].sqrt() + tau) for key in mean}
        return {**params, **moved}, {**state, **under("m", m), **under("v", v)}

    return ServerOptimizer(f"{name}(lr {learning_rate:g}, tau {tau:g})", init, step)


def fedadagrad(learning_rate: float = 1e-2, beta1: float = 0.0, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdagrad: v = v + g^2."""
    return adaptive("FedAdagrad", lambda v, g2: v + g2, learning_rate, beta1, tau)


def fedadam(learning_rate: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedAdam: v = beta2 v + (1 - beta2) g^2."""
    return adaptive("FedAdam", lambda v, g2: beta2 * v + (1 - beta2) * g2, learning_rate, beta1, tau)


def fedyogi(learning_rate: float = 1e-2, beta1: float = 0.9, beta2: float = 0.99, tau: float = 1e-3) -> ServerOptimizer:
    """FedYogi: v = v - (1 - beta2) g^2 sign(v - g^2)."""
    return adaptive("FedYogi", lambda v, g2: v - (1 - beta2) * g2 * torch.sign(v - g2), learning_rate, beta1, tau)
