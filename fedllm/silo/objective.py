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


def causal_loss(autocast: torch.dtype | None = None) -> Objective:
    """Build the objective; with `autocast` the model computes in that type over its own weights.

    Logits are made only from the first scored position on: where prompts are long that is most of
    the memory and, with a large vocabulary, a good part of the time.
    """

    def loss_B(model: nn.Module, batch: Batch) -> Tensor:
        scored_BT = batch.labels_BT != IGNORED
        scored_BT[:, 0] = False
        any_T = scored_BT.any(0)
        if not bool(any_T.any()):
            return batch.labels_BT.new_zeros(len(batch.labels_BT), dtype=torch.float32)
        first = int(any_T.int().argmax())
        # Keeping one position more than is scored: the logits before a token predict it.
        keep = batch.labels_BT.shape[1] - first + 1
        kwargs = {"logits_to_keep": keep} if takes_logits_to_keep(model) else {}
        with torch.autocast(batch.input_ids_BT.device.type, autocast, enabled=autocast is not None):
            logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False, **kwargs).logits
        logits_BTV = logits_BTV[:, -keep:-1]
        scored_BT = scored_BT[:, first:]
        nll = functional.cross_entropy(
            logits_BTV[scored_BT].float(), batch.labels_BT[:, first:][scored_BT], reduction="none"
        )
        return nll.new_zeros(len(scored_BT)).index_add(0, scored_BT.nonzero()[:, 0], nll)

    return loss_B


def takes_logits_to_keep(model: Any) -> bool:
    """Say whether the model can be asked for the last logits only."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return forward_takes(type(base), "logits_to_keep")


@lru_cache
def forward_takes(kind: type[nn.Module], parameter: str) -> bool:
    """Say whether the forward of a kind of model has a parameter of that name."""
    return parameter in inspect.signature(kind.forward).parameters
