"""Gaussian noise on the counts of all pairs that there could be, drawn only where it shows.

Dwork and Roth 2014, appendix A: the Gaussian mechanism, on the histogram over all `symbols`^2 pairs. That one silo has
a pair at all must not show either, so pairs that it has not get noise too; of these only the few above a threshold
are drawn, which gives the same distribution (Cormode et al., Differentially Private Summaries for Sparse Data, ICDT
2012). The threshold does not depend on the data.
"""

from __future__ import annotations

import hashlib
import secrets

import numpy as np
import torch
from torch import Tensor

from fedllm.core.types import Tensors
from fedllm.silo.token_counts import Pairs

FALSE_SHARE = 1 / 16
"""Of the pairs in a reply, those that are only noise, on average at most."""


def noised(pairs: Pairs, symbols: int, sigma: float, limit: int, random: np.random.Generator) -> Pairs:
    """Return the counts plus N(0, sigma^2), as if every one of the `symbols`^2 pairs had been looked at.

    Kept are those above a threshold that `limit` / 16 pairs without any count exceed on average.
    """
    from scipy.stats import norm

    everything = symbols * symbols
    tail = min(0.5, limit * FALSE_SHARE / everything)
    threshold = sigma * norm.isf(tail)
    counts_P = pairs.counts_P + random.normal(0.0, sigma, len(pairs.counts_P))
    above = counts_P > threshold
    absent = unused(pairs, symbols, int(random.binomial(everything - len(pairs.keys_P), tail)), random)
    noise = sigma * norm.isf(tail * (1 - random.random(len(absent))))
    keys = np.concatenate([pairs.keys_P[above], absent])
    order = np.argsort(keys)
    return Pairs(keys[order], np.concatenate([counts_P[above], noise])[order])


def unused(pairs: Pairs, symbols: int, count: int, random: np.random.Generator) -> np.ndarray:
    """Draw `count` different pairs that are not among these, all alike."""
    found = np.zeros(0, np.int64)
    while len(found) < count:
        drawn = random.integers(0, symbols, (2, 2 * count + 16))
        new = drawn[0] << 32 | drawn[1]
        fresh = new[~np.isin(new, pairs.keys_P) & ~np.isin(new, found)]
        _, first = np.unique(fresh, return_index=True)
        found = np.concatenate([found, fresh[np.sort(first)]])[:count]
    return found


def secret_of(memory: Tensors) -> Tensor:
    """Return the node's own secret, drawn once: the recipe's seed is known to the server and hides nothing."""
    if "secret" in memory:
        return memory["secret"]
    return torch.frombuffer(bytearray(secrets.token_bytes(32)), dtype=torch.uint8)


def random_of(secret: Tensor, round_number: int, merges: np.ndarray) -> np.random.Generator:
    """Return the noise's generator for one question, so that asked again a node says the same and tells no more."""
    digest = hashlib.blake2b(secret.numpy().tobytes(), person=b"token counts")
    digest.update(round_number.to_bytes(8, "little") + np.ascontiguousarray(merges, np.int64).tobytes())
    return np.random.default_rng(int.from_bytes(digest.digest(), "little"))
