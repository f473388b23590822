"""Noise at the server with a clip bound that follows the updates: no need to know their size beforehand."""

from __future__ import annotations

import math

import torch

from fedllm.core.errors import FedllmError
from fedllm.core.noise import key_of, normals, require_float32, with_noise
from fedllm.core.tensors import norm, require_like
from fedllm.core.types import Cut, Facts, Tensors, Transform
from fedllm.exchange.clip import clip
from fedllm.exchange.server_noise import MARK, Around, bounded_by, release, require_sense, slack

NORM = "norm"
STEPS = 2.0**20
"""To one, of the grid for noise on a number of silos."""


def adaptive_dp(
    around: Around,
    max_norm: float = 0.1,
    noise: float | None = None,
    quantile: float = 0.5,
    rate: float = 0.2,
    count_noise: float | None = None,
) -> Transform:
    """Clip every update at the server to a bound that `quantile` of them are below, and add noise to their sum.

    Andrew et al. 2021 (arXiv:1905.03871), algorithm 1: after a round the bound is multiplied by exp(-rate * (b -
    quantile)), where b is the share of updates within it, with Gaussian noise of `count_noise` on their number (by
    default a twentieth of a round's silos, as there, or `noise` if that is more). Both noises together are worth one of
    multiplier `noise`, which is what is accounted for: that of the updates is (noise^-2 - (2 count_noise)^-2)^(-1/2)
    times the bound, since a silo changes the number by one half either way from its middle. It starts at `max_norm`.

    The bound is applied at the server alone, which is trusted with the updates; there they send what they like.
    """
    multiplier = require_sense("adaptive_dp", max_norm, noise)
    counting = max(around.expected / 20, multiplier) if count_noise is None else count_noise
    if not 0 < quantile < 1 or not rate > 0:
        raise FedllmError("transforms.adaptive_dp: quantile must be between 0 and 1 and rate above 0.")
    if not 2 * counting > multiplier:
        raise FedllmError(
            f"transforms.adaptive_dp: count_noise is {counting:g}, and with noise {multiplier:g} it must be above "
            f"{multiplier / 2:g}: the number would tell more than both may."
        )
    of_updates = (multiplier**-2 - (2 * counting) ** -2) ** -0.5

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[Tensors, Tensors]:
        require_float32(update)
        return update, {}

    def at(number: int, state: Tensors) -> Transform:
        bound = float(state[NORM]) if NORM in state else max_norm
        clipped, within = clip(bound), list[bool]()

        def decode(wire: Tensors, like: Tensors) -> Tensors:
            # What is refused must not be counted, and after this transform nothing more is looked at.
            require_like(wire, like)
            within.append(bool(norm(wire) <= bound))
            return clipped.decode(wire, like)

        def finish(mean: Tensors, state: Tensors, cut: Cut) -> tuple[Tensors, Tensors]:
            now = release(mean, cut, around)
            middle = sum(each - 0.5 for each in within)
            key = key_of(now.key, "count", len(within), round(2 * middle))
            drawn = counting * slack(around.expected) * float(next(normals(key, 1)))
            # Both are whole multiples of one step, so that their sum gives no bit of the number away.
            noised = middle + round(drawn * STEPS) / STEPS
            share = noised / around.expected + 0.5
            after = bound * math.exp(-rate * (share - quantile))
            deviation = of_updates * bound * slack(around.expected) / around.expected
            kept = {MARK: now.mark, NORM: torch.tensor(after, dtype=torch.float64)}
            return with_noise(now.total, deviation, key_of(now.key, "updates")), kept

        return template._replace(decode=decode, finish=finish)

    def decoded(facts: Facts) -> Facts:
        return facts._replace(norm_bound=math.inf)

    def finished(facts: Facts) -> Facts:
        return bounded_by(math.inf, "adaptive_dp", multiplier, facts)

    def nowhere(*given: object) -> tuple[Tensors, Tensors]:
        raise AssertionError("the server's half is made anew for every round")

    template = Transform(
        f"adaptive clip and noise at the server ({multiplier:.3g})",
        encode,
        nowhere,  # type: ignore[arg-type]
        decoded=decoded,
        finished=finished,
        always=True,
        at=at,
    )
    return template
