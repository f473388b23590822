"""Whether a model still knows texts apart from others like them: what is left of those that it had to forget.

Membership inference by the loss (Yeom et al. 2018, arXiv:1709.01604), and by the loss against that of the model before
training (as in Carlini et al. 2021, arXiv:2012.07805, section 5): the area under the ROC curve, 0.5 for chance, with
the standard error of Hanley and McNeil 1982.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from torch import nn

from fedllm.audit.intervals import auc
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import Objective
from fedllm.silo.scoring import log_likelihoods


class Known(NamedTuple):
    """How well a model tells texts that were to be forgotten from others that it never learned from."""

    loss: float
    """Mean loss a text, in nats a scored token: of those to be forgotten."""
    loss_others: float
    auc: float
    """By the loss alone."""
    auc_against_base: float
    """By how much the loss fell since before training."""
    error: float
    """Standard error of `auc`."""


def losses(model: nn.Module, examples: Sequence[Example], objective: Objective, pad_id: int, size: int) -> list[float]:
    """Return each text's loss in nats a scored token."""
    scored = [sum(label != IGNORED for label in example.labels[1:]) for example in examples]
    sums = log_likelihoods(model, examples, objective, pad_id=pad_id, batch_size=size)
    return [-total / max(1, count) for total, count in zip(sums, scored, strict=True)]


def known(now: Sequence[float], others: Sequence[float], base: Sequence[float], base_others: Sequence[float]) -> Known:
    """Return what the losses of texts and of others tell, now and before training."""
    shown = auc([-loss for loss in now], [-loss for loss in others])
    fell, others_fell = (
        [was - loss for was, loss in zip(before, after, strict=True)]
        for before, after in ((base, now), (base_others, others))
    )
    mean, mean_others = (sum(each) / len(each) for each in (now, others))
    return Known(mean, mean_others, shown, auc(fell, others_fell), standard_error(shown, len(now), len(others)))


def standard_error(auc: float, members: int, others: int) -> float:
    """Return the standard error of an area (Hanley and McNeil 1982, equation 2)."""
    first, second = auc / (2 - auc), 2 * auc**2 / (1 + auc)
    spread = auc * (1 - auc) + (members - 1) * (first - auc**2) + (others - 1) * (second - auc**2)
    return math.sqrt(max(0.0, spread) / (members * others))
