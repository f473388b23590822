"""Differential privacy for silos without a trusted server: each adds a part of the noise, and only the sum is seen."""

from __future__ import annotations

from fedllm.core.errors import FedllmError
from fedllm.core.noise import require_float32
from fedllm.core.types import Cut, Facts, Tensors, Transform
from fedllm.exchange.clip import clip
from fedllm.exchange.server_noise import Around, require_sense


def distributed_dp(around: Around, max_norm: float, noise: float | None = None) -> Transform:
    """Clip every update to `max_norm`; the silos add noise of standard deviation `noise` * `max_norm` to their sum.

    Kairouz, Liu and Steinke 2021 (arXiv:2102.06387): the noise is added as whole numbers under secure aggregation
    (`exchange/secure/noise.py`), so it costs what noise at a trusted server does. The sum is divided by the expected
    number of silos. The server sees who took part, so that drawing silos by chance hides nothing from it.
    """
    multiplier, clipped = require_sense("distributed_dp", max_norm, noise), clip(max_norm)

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[Tensors, Tensors]:
        require_float32(update)
        return clipped.encode(update, memory, seed)

    def finish(mean: Tensors, state: Tensors, cut: Cut) -> tuple[Tensors, Tensors]:
        return {name: value * (cut.clients / around.expected) for name, value in mean.items()}, {}

    def finished(facts: Facts) -> Facts:
        if facts.sees != "sum" or facts.noise is None or not facts.even:
            raise FedllmError(
                "transforms: 'distributed_dp' needs the silos' noise in a secure sum in which every silo counts alike; "
                "add [secure], and set aggregate = { name = 'mean', weights = 'uniform' }."
            )
        return facts

    return Transform(
        f"clip for noise of the silos together ({multiplier:.3g} x {max_norm:g})",
        encode,
        # What comes back has noise on it, and to clip that again would spoil it.
        lambda wire, like: wire,
        finish,
        claim=clipped.claim,
        finished=finished,
        summable=True,
    )
