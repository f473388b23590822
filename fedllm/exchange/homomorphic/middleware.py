"""Homomorphic encryption around an exchange: what a recipe's `[homomorphic]` makes."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import lru_cache

import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Facts, Middleware, Tensors
from fedllm.exchange.homomorphic.ckks import DEGREE, Keys, opened
from fedllm.exchange.homomorphic.messages import CIPHER, OPEN
from fedllm.exchange.homomorphic.packing import rows_for
from fedllm.exchange.homomorphic.server import homomorphic_exchange
from fedllm.exchange.homomorphic.settings import Settings, hidden, require_settings
from fedllm.exchange.homomorphic.silo import Made, homomorphic_client, homomorphic_cohort

MOST_BYTES = 256 * 2**20
"""Of one silo's ciphertexts in a round."""


def homomorphic_sum(
    settings: Settings,
    key: bytes,
    secret: bytes,
    bound: float | None,
    like: Callable[[int], Tensors],
    weighted: bool = True,
    period: int = 1,
) -> Middleware:
    """Let the server see of the tensors that are encrypted nothing but the mean of the silos' updates.

    `key` is the silos'; a server is built with another one, which it has no use for. `secret` is each node's own.
    `bound` is the largest norm of an update, from which the numbers have their range. `like(round)` is what an update
    looks like, the same every `period` rounds. With `weighted` silos count by their weight, which is inside the sum.

    Raises:
        FedllmError: now or when the plan is made, where it does not fit.
    """
    require_settings(settings)
    if bound is None or not math.isfinite(bound):
        raise FedllmError(
            "[homomorphic] adds updates up as whole numbers, whose range comes from the largest norm that an update "
            "can have, and there is none; add [[transforms]] name = 'clip' as the last of them."
        )
    made = Made(settings, weighted, min(bound, settings.largest_value or bound), like)
    stages = [like(number) for number in range(period)]
    for pattern in settings.tensors:
        if not any(hidden(settings._replace(tensors=[pattern]), stage) for stage in stages):
            some = ", ".join(f"'{name}'" for name in list(stages[0])[:2])
            raise FedllmError(f"homomorphic.tensors has '{pattern}', which no tensor is called; there are {some}...")
    require_small(made, period)

    @lru_cache(maxsize=1)
    def keys() -> Keys:
        return opened(key)

    def wire(tensors: Tensors) -> Tensors:
        kind = torch.int16 if settings.bits == 16 else torch.int32
        names = hidden(settings, tensors)
        rows = rows_for(sum(tensors[name].numel() for name in names), settings.bits)
        sent = {name: value.to(kind) for name, value in tensors.items() if name not in names}
        return {**sent, CIPHER: torch.empty(rows, 2, DEGREE, dtype=torch.int64, device="meta")}

    def claim(facts: Facts) -> Facts:
        if facts.sees != "each":
            raise FedllmError("[homomorphic] stands inside another sum; keep one of them.")
        if facts.norm_bound is None or facts.norm_bound > bound:
            raise FedllmError("[homomorphic]: an update may be longer than its numbers have room for; put 'clip' last.")
        whole = all(len(hidden(settings, stage)) == len(stage) for stage in stages)
        return facts._replace(sees="sum" if whole else "part")

    return Middleware(
        f"homomorphic sum in {settings.bits} bits",
        lambda exchange: homomorphic_exchange(exchange, made, secret),
        lambda inner: homomorphic_client(inner, made, keys, key, secret),
        claim,
        ops=(OPEN,),
        cohort=lambda inner: homomorphic_cohort(inner, made, keys, key, secret),
        wire=wire,
    )


def require_small(made: Made, period: int) -> None:
    """Raise for updates whose ciphertexts are larger than `MOST_BYTES`."""
    values = max(made.encrypted_values(number) for number in range(period))
    size = rows_for(values, made.settings.bits) * 2 * DEGREE * 8
    if size > MOST_BYTES:
        raise FedllmError(
            f"[homomorphic] would encrypt {values:,} values of each silo as {size / 2**20:,.0f} MB a round, and "
            f"{MOST_BYTES // 2**20} MB is the most; encrypt fewer (homomorphic.tensors), train fewer (trainable.r), "
            "set homomorphic.bits = 16, or use [secure], whose sums cost hardly more than plain ones."
        )
