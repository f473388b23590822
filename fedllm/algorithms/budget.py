"""What a search may spend on a model: calls and tokens, divided before they are spent, so that it is never exceeded.

A call is one prompt with one example: what an API is asked once and bills for. Tokens are those of the prompt and the
example together, though a model on the spot reads a prompt once for all examples.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError

UNLIMITED = 1 << 62
"""More than anybody spends."""


class Budget(NamedTuple):
    """How much of each there is, or is left."""

    calls: int
    tokens: int

    def minus(self, calls: int, tokens: int) -> Budget:
        """Return what is left after something was spent; never below nothing."""
        return Budget(max(0, self.calls - calls), max(0, self.tokens - tokens))

    def share(self, of: int) -> Budget:
        """Return what each of so many gets."""
        return Budget(self.calls // max(1, of), self.tokens // max(1, of))

    def tensor(self) -> Tensor:
        """Return it as it is kept between rounds."""
        return torch.tensor([self.calls, self.tokens], dtype=torch.int64)


def new_budget(calls: int, tokens: int | None) -> Budget:
    """Check a recipe's budget; `tokens` None is no limit. Raises `FedllmError` where nothing could be done with it."""
    for key, value in (("calls", calls), ("tokens", tokens)):
        if value is not None and value <= 0:
            raise FedllmError(f"algorithm.{key} is {value}; nothing can be scored with a budget of zero, so raise it.")
    return Budget(calls, UNLIMITED if tokens is None else tokens)


def kept_budget(value: Tensor) -> Budget:
    """Return what was kept."""
    return Budget(int(value[0]), int(value[1]))
