"""What the transforms have in common that clip each silo's update and let the server add noise to the sum.

The guarantee is about silos: whether one takes part at all, with everything that it has, hardly shows in what the
server hands on. The server itself sees every update and is trusted with it. The sum is divided by a fixed number, which
is public, and not by how many silos answered (McMahan et al. 2018, arXiv:1710.06963, the estimator f_f), so that a silo
moves it by its clipped update and by nothing else.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.noise import digest, key_of, require_float32
from fedllm.core.types import Cut, Facts, Tensors

MARK = "mark"
"""Where a transform remembers which aggregate its last noise was for: other noise was another release."""


class Around(NamedTuple):
    """What noise at the server needs to know of the run."""

    secret: bytes
    """Only the server has it."""
    expected: float
    """Silos of a round, on average over chance; the sum is divided by it."""
    apart: int = 1
    """Rounds from one turn of a silo to its next, at least."""


class Release(NamedTuple):
    """One aggregate that noise is to be added to."""

    total: Tensors
    """The sum of the silos' updates over the expected number of silos."""
    key: bytes
    mark: Tensor


def release(mean: Tensors, cut: Cut, around: Around) -> Release:
    """Turn a uniform mean over those who answered into the sum over the expected number, with its key."""
    require_float32(mean)
    seen = digest(mean)
    key = key_of(around.secret, "server noise", cut.round, cut.clients, seen)
    total = {name: value * (cut.clients / around.expected) for name, value in mean.items()}
    mark = torch.frombuffer(bytearray(key_of(key, MARK)[:16]), dtype=torch.uint8)
    return Release(total, key, mark)


def slack(expected: float) -> float:
    """Return by how much rounding can lengthen what one silo adds, so that noise is scaled up by as much.

    Of 1 / 1024 half is for the norm in float32 and for the grid of the noise; a mean over m silos in float32 is off by
    up to m / 2^23 of the clip bound in all.
    """
    return 1 + 2.0**-10 + expected * 2.0**-21


def bounded_by(max_norm: float, name: str, noise: float, facts: Facts) -> Facts:
    """Say what is known after noise, or refuse: without a bound on each silo's part noise hides nothing."""
    if facts.noise is not None:
        raise FedllmError(f"transforms: '{name}' adds noise a second time; keep one transform that adds noise.")
    if not facts.even:
        raise FedllmError(
            f"transforms: '{name}' needs a plain mean in which every silo counts alike, since a weight is something of "
            "the silo's own and makes its part larger than the noise is for; set aggregate = { name = 'mean', weights "
            "= 'uniform' }."
        )
    if facts.norm_bound is None or facts.norm_bound > max_norm:
        raise FedllmError(
            f"transforms: '{name}' adds noise to updates whose norm is not bounded by then, which hides nothing: a "
            "codec before it undoes the clip at the server; put it first of [[transforms]]."
        )
    return facts._replace(noise=noise)


def require_sense(name: str, max_norm: float, noise: float | None) -> float:
    """Return the noise, or raise for settings that cannot be meant."""
    if max_norm <= 0:
        raise FedllmError(f"transforms.{name}: max_norm is {max_norm:g}; it must be above 0.")
    if noise is None:
        raise FedllmError(
            f"transforms.{name} has no 'noise'; set it (standard deviation over max_norm, such as 1.0), or set "
            "privacy.target_epsilon and it is solved for."
        )
    if not noise > 0:
        raise FedllmError(f"transforms.{name}: noise is {noise:g}; it must be above 0, or else there is no privacy.")
    return noise
