"""Send values at places that follow from seed and round alone, so that all silos send the same ones and sums work."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.core.types import Tensors, Transform
from fedllm.exchange.error_feedback import Codec, tensorwise


def random_k(fraction: float, error_feedback: bool = True, seed: int = 0) -> Transform:
    """Keep a random `fraction` of each tensor's values, other ones in every round and the same ones at all silos.

    Konečný et al. 2016 (arXiv:1610.05492), section 2, random mask, with one mask for all silos as random-k has it in
    Vogels et al. 2019 (arXiv:1905.13727), section 4.1: what travels is the values alone, and their mean over the silos
    is the mean of the updates at those places. Values are sent as they are: with `error_feedback` what is not sent is
    added to a later update and nothing is lost; without it the mean update is `fraction` of the whole one on average,
    for which a server's learning rate of 1 / fraction makes up.
    """
    if not 0 < fraction <= 1:
        raise FedllmError(f"transforms.random_k: fraction is {fraction}; it must be above 0 and at most 1.")

    def at(number: int, memory: Tensors) -> Transform:
        def places(whole: Tensor) -> Tensor:
            return drawn(seed, number, fraction, whole.numel()).to(whole.device)

        def pack(value: Tensor, own_seed: int) -> dict[str, Tensor]:
            return {"values": value.flatten()[places(value)]}

        def unpack(parts: Tensors, like: Tensor) -> Tensor:
            values = parts["values"].to(like.dtype)
            whole = values.new_zeros(like.numel())
            return whole.index_put((places(whole),), values).view(like.shape)

        codec = Codec(f"random {fraction:g}", pack, unpack, lambda name, parts, like: None)
        return tensorwise(codec, float(error_feedback))

    return at(0, {})._replace(at=at, summable=True)


@lru_cache(maxsize=64)
def drawn(seed: int, number: int, fraction: float, size: int) -> Tensor:
    """Return the places of a round in a tensor of so many values, rising."""
    order = torch.randperm(size, generator=generator(seed, "random_k", number, size))
    return order[: max(1, round(fraction * size))].sort().values
