"""How much each layer tells a silo's examples apart: the score by which FedPepTAO chooses layers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedllm.silo.examples import Example, collate

SMALL = 1e-5
"""What is added to eigenvalues, so that none is nothing; as in the paper's code."""


def layer_scores(model: nn.Module, examples: Sequence[Example], pad_id: int) -> Tensor:
    """Return the score of each layer, [L] in float64, from what it makes of the examples' last tokens."""
    rows: Any = model
    batch = collate(examples, pad_id, next(model.parameters()).device)
    with torch.no_grad():
        told = rows(input_ids=batch.input_ids_BT, use_cache=False, output_hidden_states=True)
    # Learned tokens may stand before the text, so places are counted from the end.
    width = batch.input_ids_BT.shape[1]
    ends_B = torch.tensor([len(each.input_ids) - 1 - width for each in examples], device=batch.input_ids_BT.device)
    every_B = torch.arange(len(examples), device=ends_B.device)
    made = [hidden_BTH[every_B, ends_B + hidden_BTH.shape[1]] for hidden_BTH in told.hidden_states[1:]]
    return torch.stack([distinctness(hidden_BH.double().cpu()) for hidden_BH in made])


def distinctness(hidden_BH: Tensor) -> Tensor:
    """Return the sum of log(l) + 1 / l over the eigenvalues l of the cosine similarities of the rows.

    It is B where no two rows have anything in common, and grows as rows become alike.

    >>> distinctness(torch.eye(3, dtype=torch.float64)).round(decimals=3)
    tensor(3., dtype=torch.float64)
    """
    unit_BH = functional.normalize(hidden_BH, dim=1)
    eigen_B = torch.linalg.eigvalsh(unit_BH @ unit_BH.mT).clamp(min=0) + SMALL
    return (eigen_B.log() + 1 / eigen_B).sum()
