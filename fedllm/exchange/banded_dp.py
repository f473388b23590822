"""Noise at the server for runs in which silos take turns: each round's noise takes back a part of the noise before it.

Nothing is drawn by chance, so nothing has to be kept secret about who takes part when. The sum of all rounds, which is
what a model is made of, has less noise than with fresh noise in every round, for the same guarantee.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.noise import grid_of, key_of, normals, on_grid, require_float32
from fedllm.core.types import Cut, Facts, Tensors, Transform
from fedllm.exchange.clip import clip
from fedllm.exchange.server_noise import MARK, Around, bounded_by, release, require_sense, slack


def banded_dp(around: Around, max_norm: float, noise: float | None = None, bands: int | None = None) -> Transform:
    """Clip every update to `max_norm` and add noise that is correlated over `bands` rounds.

    The matrix mechanism with C, the lower triangular Toeplitz matrix of the first `bands` coefficients of the square
    root of the matrix of prefix sums: c_0 = 1, c_j = c_(j-1) (2j - 1) / (2j) (Kalinin and Lampert 2024,
    arXiv:2405.13763, banded square root factorisation). The noise of the rounds is C^-1 z with independent normals z.
    A silo that comes back after `bands` rounds or more (by default as many as a cycle has) meets other columns of C
    with no row in common, so that k turns have a sensitivity of sqrt(k) times C's column norm times `max_norm`
    (Choquette-Choo et al. 2023, arXiv:2306.08153, theorem 2). z has that column norm times `noise` times `max_norm` as
    standard deviation: one cycle costs a silo as much as one round of `central_dp` with the same `noise`.
    """
    multiplier = require_sense("banded_dp", max_norm, noise)
    width = around.apart if bands is None else bands
    if not 1 <= width <= around.apart:
        raise FedllmError(
            f"transforms.banded_dp: bands is {width}, and a silo takes part every {around.apart} rounds; it must be "
            "from 1 to that, or raise select.every."
        )
    weights = coefficients(width)
    clipped = clip(max_norm)
    deviation = multiplier * max_norm * column_norm(weights) * slack(around.expected) / around.expected

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[Tensors, Tensors]:
        require_float32(update)
        return clipped.encode(update, memory, seed)

    def finish(mean: Tensors, state: Tensors, cut: Cut) -> tuple[Tensors, Tensors]:
        now, kept, noised = release(mean, cut, around), dict[str, Tensor](), dict[str, Tensor]()
        for name, value in now.total.items():
            before = [state[f"{age}/{name}"] for age in range(1, width) if f"{age}/{name}" in state]
            drawn = torch.cat(list(normals(key_of(now.key, name), value.numel())))
            fresh = drawn - sum(weight * old for weight, old in zip(weights[1:], before, strict=False))
            kept |= {f"{age}/{name}": each for age, each in enumerate([fresh, *before], 1) if age < width}
            flat = value.detach().cpu().double().flatten()
            on_grid(flat, fresh * deviation, grid_of(deviation))
            noised[name] = flat.to(value.dtype).view(value.shape).to(value.device)
        return noised, {MARK: now.mark, **kept}

    def finished(facts: Facts) -> Facts:
        return bounded_by(max_norm, "banded_dp", multiplier, facts)

    return clipped._replace(
        name=f"banded noise at the server ({multiplier:.3g} x {max_norm:g}, {width} bands)",
        encode=encode,
        finish=finish,
        finished=finished,
        always=True,
    )


def coefficients(width: int) -> list[float]:
    """Return the first coefficients of (1 - x)^(-1/2).

    >>> coefficients(4)
    [1.0, 0.5, 0.375, 0.3125]
    """
    found = [1.0]
    for place in range(1, width):
        found.append(found[-1] * (2 * place - 1) / (2 * place))
    return found


def column_norm(weights: list[float]) -> float:
    """Return the L2 norm of a column of C."""
    return sum(weight**2 for weight in weights) ** 0.5
