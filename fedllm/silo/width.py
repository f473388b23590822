"""How many clients to train as one batch: what makes it faster, and what fits."""

from __future__ import annotations

from typing import Any

import torch

FAVOURABLE_TOKENS = {"cpu": 1024, "cuda": 65536, "mps": 8192}
"""Tokens in one batch up to which another client makes each of them cheaper.

Measured on a CPU (beyond it the activations leave the cache); on the others a guess on the safe side.
"""

PASS_TOKENS = {**FAVOURABLE_TOKENS, "cpu": 256}
"""The same for rows that share all weights: on a CPU more of them only leave the cache.

Measured: SmolLM2-135M makes 1.4 times as many tokens a second as in passes of 1024, a model of 4 million weights about
as many.
"""


def cohort_width(model: Any, rows: int, tokens: int, device: torch.device) -> int:
    """Return the number of clients whose batches of `rows` x `tokens` train best as one; 1 is one by one."""
    limit = FAVOURABLE_TOKENS.get(device.type, 1)
    if device.type == "cuda":
        limit = min(limit, fitting_tokens(model, torch.cuda.mem_get_info(device)[0]))
    return max(1, limit // max(1, rows * tokens))


def pass_tokens(model: Any, device: torch.device) -> int:
    """Return how many tokens are computed best at once: always the same on a machine, whatever else it is doing."""
    limit = PASS_TOKENS.get(device.type, 1)
    if device.type == "cuda":
        # Weights in float32 keep twice as much of a token.
        limit = min(limit, fitting_tokens(model, torch.cuda.get_device_properties(device).total_memory // 2))
    return limit


def fitting_tokens(model: Any, free: int) -> int:
    """Return how many tokens a batch may have in half of `free` bytes.

    A token keeps about 20 hidden vectors a layer in two bytes, and its logits in two and twice in four.
    """
    config = model.config
    token = config.vocab_size * 10 + config.num_hidden_layers * config.hidden_size * 40
    return free // 2 // token
