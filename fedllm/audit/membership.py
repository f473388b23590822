"""Membership inference: whether a text is one that the model learned from.

Three scores, higher for members: the loss itself (Yeom et al. 2018, arXiv:1709.01604), the loss against that of the
model before training (a reference as in Carlini et al. 2021, arXiv:2012.07805, section 5), and Min-K% (Shi et al. 2024,
arXiv:2310.16789): the mean log-probability of the k % least likely tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import nn
from torch.nn import functional

from fedllm.core.types import ignore
from fedllm.silo.examples import IGNORED, Example, collate

LEAST = 0.2
"""Share of a text's tokens that Min-K% looks at."""


def token_scores(
    model: nn.Module,
    examples: Sequence[Example],
    pad_id: int,
    batch_size: int = 16,
    tick: Callable[[int], None] = ignore,
) -> list[list[float]]:
    """Return the log-probability of every scored token of each example, in nats."""
    device = next(model.parameters()).device
    order = sorted(range(len(examples)), key=lambda place: -len(examples[place].input_ids))
    found: list[list[float]] = [[] for _ in examples]
    model.eval()
    for first in range(0, len(order), batch_size):
        places = order[first : first + batch_size]
        batch = collate([examples[place] for place in places], pad_id, device)
        with torch.no_grad():
            logits_BTV = model(input_ids=batch.input_ids_BT, use_cache=False).logits[:, :-1].float()
        labels_BT = batch.labels_BT[:, 1:]
        nll_BT = functional.cross_entropy(logits_BTV.transpose(1, 2), labels_BT, ignore_index=IGNORED, reduction="none")
        for place, nll_T, labels_T in zip(places, nll_BT, labels_BT, strict=True):
            found[place] = (-nll_T[labels_T != IGNORED]).tolist()
        tick(int(batch.input_ids_BT.numel()))
    return found


def by_loss(scores: Sequence[float]) -> float:
    """Return the mean log-probability."""
    return sum(scores) / len(scores)


def by_reference(scores: Sequence[float], before: Sequence[float]) -> float:
    """Return by how much the mean log-probability has risen since before training."""
    return by_loss(scores) - by_loss(before)


def by_least(scores: Sequence[float], share: float = LEAST) -> float:
    """Return the mean log-probability of the least likely share of the tokens, one at least.

    >>> by_least([-1.0, -5.0, -2.0, -3.0, -4.0], 0.4)
    -4.5
    """
    least = sorted(scores)[: max(1, int(share * len(scores)))]
    return sum(least) / len(least)
