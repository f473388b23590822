"""Secure aggregation around an exchange: what a recipe's `[secure]` makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Facts, Middleware, Tensors
from fedllm.exchange.secure.beside import SIZE
from fedllm.exchange.secure.fixed_point import Grid, grid, room_for
from fedllm.exchange.secure.messages import KEYS, SHARES, SUM, TAIL
from fedllm.exchange.secure.server import secure_exchange
from fedllm.exchange.secure.settings import Circle, Settings, SumNoise, require_settings
from fedllm.exchange.secure.silo import Made, secure_client, secure_cohort

PHASES = (KEYS, SHARES, SUM)
"""What its client half answers beside training, each once a round."""


def secure_sum(
    settings: Settings,
    secret: bytes,
    bound: float | None,
    like: Callable[[int], Tensors],
    weighted: bool = True,
    noise: SumNoise | None = None,
    seed: int = 0,
) -> Middleware:
    """Let the server see nothing but the mean of the silos' updates, or of each of the groups dealt by `seed`.

    `bound` is the largest norm of an update, from which the numbers have their range. `like(round)` is what an update
    looks like. With `weighted` silos count by their weight, which is inside the sum. Each silo adds the discrete
    Gaussian of variance (multiplier * sensitivity)^2 / h, where h is the number of silos that are surely in the sum and
    do not collude: so the sum has as much noise as is claimed for it, however many drop out or tell what they added.

    Raises:
        FedllmError: now or when the plan is made, where it does not fit.
    """
    require_settings(settings)
    if bound is None or not math.isfinite(bound):
        raise FedllmError(
            "[secure] adds updates up as whole numbers, whose range comes from the largest norm that an update can "
            "have, and there is none; add [[transforms]] name = 'clip' as the last of them."
        )
    if noise and weighted:
        raise FedllmError(
            "[secure]: the sum of weights has no noise on it; with noise set aggregate = { name = 'mean', weights = "
            "'uniform' }."
        )
    if noise and settings.groups > 1:
        raise FedllmError(
            "[secure]: noise of the silos together is measured for one sum, and secure.groups makes several; set "
            "secure.groups = 1, or let each silo add all of its noise (client.noise_in = 'silo', or 'local_dp')."
        )
    if noise and settings.bits != 32:
        raise FedllmError("[secure]: noise in the sum needs room; set secure.bits = 32.")
    largest = min(bound, settings.largest_value or bound)

    @lru_cache(maxsize=256)
    def grid_of(now: Circle) -> Grid:
        # All of a round's silos may be in it, each with the part that is enough if only the honest ones are.
        deviation = noise.multiplier * noise.sensitivity * math.sqrt(now.silos / now.honest) if noise else 0.0
        return grid(settings.bits, largest, now.silos, deviation)

    def part(now: Circle, dimension: int) -> float:
        if not noise:
            return 0.0
        used = grid_of(now)
        changed = room_for(noise.sensitivity, dimension, used)
        return noise.multiplier * changed / used.step / math.sqrt(now.honest)

    made = Made(settings, weighted, grid_of, part)

    def wire(tensors: Tensors) -> Tensors:
        kind = torch.int16 if settings.bits == 16 else torch.int32
        sent = {name: value.to(kind) for name, value in tensors.items()}
        return {**sent, TAIL: torch.empty(SIZE, dtype=torch.int32, device="meta")}

    def claim(facts: Facts) -> Facts:
        if facts.sees != "each":
            raise FedllmError("[secure] is around the exchange twice; keep one of them.")
        if facts.norm_bound is None or facts.norm_bound > bound:
            raise FedllmError("[secure]: an update may be longer than its numbers have room for; put 'clip' last.")
        told = noise.multiplier * noise.sensitivity / bound if noise else facts.noise
        return facts._replace(sees="sum" if settings.groups == 1 else "groups", noise=told)

    what = "secure sum" if settings.groups == 1 else f"secure sums of {settings.groups} groups"
    return Middleware(
        f"{what} in {settings.bits} bits" + (" with noise of the silos together" if noise else ""),
        lambda exchange: secure_exchange(exchange, made, like, seed),
        lambda inner: secure_client(inner, made, secret),
        claim,
        ops=PHASES,
        cohort=lambda inner: secure_cohort(inner, made, secret),
        wire=wire,
    )
