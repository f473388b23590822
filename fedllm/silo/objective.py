"""The loss of a causal language model on the scored tokens of each row."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedllm.silo.examples import IGNORED, Batch

Objective: TypeAlias = Callable[[nn.Module, Batch], Tensor]
"""From a batch to loss_B, the summed negative log-likelihood of each row's scored tokens, in nats."""

DENSE = 0.75
"""Share of scored positions above which picking them out costs more than the softmax of the rest."""


def causal_loss(autocast: torch.dtype | None = None) -> Objective:
    """Build the objective; with `autocast` the model computes in that type over its own weights.

    Logits are made only from the first scored position on: where prompts are long that is most of
    the memory and, with a large vocabulary, a good part of the time.
    """

    def loss_B(model: nn.Module, batch: Batch) -> Tensor:
        rows, width = batch.labels_BT.shape
        any_T = (batch.labels_BT[:, 1:] != IGNORED).any(0)
        if not bool(any_T.any()):
            return batch.labels_BT.new_zeros(rows, dtype=torch.float32)
        first = int(any_T.int().argmax())
        # As indices, since a slice is not contiguous and the last layer would copy its weights for each row.
        places_T = torch.arange(first - width, 0, device=batch.labels_BT.device)
        kwargs = {"logits_to_keep": places_T} if takes_logits_to_keep(model) else {}
        with torch.autocast(batch.input_ids_BT.device.type, autocast, enabled=autocast is not None):
            logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False, **kwargs).logits
        if not kwargs:
            logits_BTV = logits_BTV[:, first - width :]
        # Logits predict the next token; what follows a row's last is not scored.
        next_BT = functional.pad(batch.labels_BT[:, first + 1 :], (0, 1), value=IGNORED)
        logits_NV, next_N = logits_BTV.flatten(0, 1), next_BT.flatten()
        scored = (next_N != IGNORED).nonzero()[:, 0]
        if len(scored) > DENSE * len(next_N):
            nll_N = functional.cross_entropy(logits_NV.float(), next_N, ignore_index=IGNORED, reduction="none")
            return nll_N.view(rows, -1).sum(1)
        nll = functional.cross_entropy(logits_NV.index_select(0, scored).float(), next_N[scored], reduction="none")
        return nll.new_zeros(rows).index_add(0, scored // next_BT.shape[1], nll)

    return loss_B


def takes_logits_to_keep(model: Any) -> bool:
    """Say whether the model can be asked for the last logits only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return "logits_to_keep" in forward_parameters(type(base).forward)


@lru_cache
def forward_parameters(forward: Callable[..., Any]) -> frozenset[str]:
    """Return the names of a forward's parameters."""
    return frozenset(inspect.signature(forward).parameters)
