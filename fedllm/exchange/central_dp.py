"""Differential privacy for silos: clip each update, add noise to their sum at the server."""

from __future__ import annotations

from fedllm.core.noise import require_float32, with_noise
from fedllm.core.types import Cut, Facts, Tensors, Transform
from fedllm.exchange.clip import clip
from fedllm.exchange.server_noise import MARK, Around, bounded_by, release, require_sense, slack


def central_dp(around: Around, max_norm: float, noise: float | None = None) -> Transform:
    """Clip every update to `max_norm`, at the silo and again at the server, and add noise to the sum.

    DP-FedAvg (McMahan et al. 2018, arXiv:1710.06963, algorithm 1, with the fixed denominator f_f): the standard
    deviation on the average is noise * max_norm / (silos of a round, expected). A round without any update gets noise
    too: that nobody came must not show.
    """
    multiplier = require_sense("central_dp", max_norm, noise)
    clipped = clip(max_norm)
    deviation = multiplier * max_norm * slack(around.expected) / around.expected

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[Tensors, Tensors]:
        require_float32(update)
        return clipped.encode(update, memory, seed)

    def finish(mean: Tensors, state: Tensors, cut: Cut) -> tuple[Tensors, Tensors]:
        now = release(mean, cut, around)
        return with_noise(now.total, deviation, now.key), {MARK: now.mark}

    def finished(facts: Facts) -> Facts:
        return bounded_by(max_norm, "central_dp", multiplier, facts)

    return clipped._replace(
        name=f"noise at the server ({multiplier:.3g} x {max_norm:g})",
        encode=encode,
        finish=finish,
        finished=finished,
        always=True,
    )
