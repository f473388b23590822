"""How many clients to train as one batch: what makes it faster, and what fits."""

from __future__ import annotations

import torch
from torch import nn

FAVOURABLE_TOKENS = {"cpu": 1024, "cuda": 65536, "mps": 8192}
"""Tokens in one batch up to which another client makes each of them cheaper."""


def cohort_width(model: nn.Module, rows: int, tokens: int, device: torch.device) -> int:
    """Return the number of clients whose batches of `rows` x `tokens` train best as one; 1 is one by one."""
    return max(1, FAVOURABLE_TOKENS.get(device.type, 1) // max(1, rows * tokens))
