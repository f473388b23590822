"""Differential privacy for silos that trust nobody: clip the update and add noise to it before it leaves."""

from __future__ import annotations

from collections.abc import Sequence

from fedllm.core.errors import FedllmError
from fedllm.core.noise import digest, key_of, require_float32, with_noise
from fedllm.core.types import Facts, Reply, Request, Silo, Tensors, Transform, Work
from fedllm.exchange.clip import clip
from fedllm.exchange.server_noise import require_sense, slack


def local_dp(secret: bytes, max_norm: float, noise: float | None = None) -> Transform:
    """Clip the update to `max_norm` and add noise of standard deviation `noise` * `max_norm` to every value.

    The Gaussian mechanism (Dwork and Roth 2014, appendix A) once a round that a silo takes part in. The server sees who
    took part, so that drawing silos by chance hides nothing. Every silo's noise is in the sum: with n silos the mean
    has sqrt(n) times the noise that a trusted server would have added.
    """
    multiplier = require_sense("local_dp", max_norm, noise)
    clipped, deviation = clip(max_norm), multiplier * max_norm * slack(1.0)

    def encode(update: Tensors, memory: Tensors, seed: int) -> tuple[Tensors, Tensors]:
        require_float32(update)
        short, _ = clipped.encode(update, {}, seed)
        if any(value.is_meta for value in short.values()):
            return short, {}
        # The seed is another one for every silo and round; with the update itself, noise is never used twice.
        return with_noise(short, deviation, key_of(secret, "silo noise", seed, digest(update))), {}

    def claim(facts: Facts) -> Facts:
        if facts.noise is not None:
            raise FedllmError("transforms: 'local_dp' adds noise a second time; keep one transform that adds noise.")
        return facts._replace(norm_bound=None, noise=multiplier)

    return Transform(
        f"noise at the silo ({multiplier:.3g} x {max_norm:g})", encode, lambda wire, like: wire, claim=claim
    )


def nothing_else(work: Work) -> Work:
    """Let nothing leave a silo beside its update: losses, counts and weights have no noise on them."""

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        reply, memory = work.client(request, silo)
        return reply._replace(weight=1.0, scalars={}), memory

    def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        assert work.cohort is not None
        return [(reply._replace(weight=1.0, scalars={}), memory) for reply, memory in work.cohort(members)]

    return Work(client, cohort if work.cohort else None, work.steps)
