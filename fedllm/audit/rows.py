"""Tokens out of an update of the embeddings: each token of a text moves its own row.

Melis et al. 2019 (arXiv:1805.04049), section 4.1: a row of the input embedding has a gradient only if its token is in
the batch, so the rows that moved are the batch's vocabulary. Where input and output share their weights every row gets
a gradient through the softmax; then those of the text stand out by their length, since the target's error is near -1
and all others' are small (the sign trick of Zhao et al. 2020, arXiv:2001.02610, row by row). An update of Adam after
one step holds hardly more than signs; there a token of the text points away from where all others point.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fedllm.core.types import Tensors

LEVEL = 2.0
"""Largest over mean absolute value up to which an update is taken for signs."""


def row_scores(model: nn.Module, update: Tensors) -> Tensor | None:
    """Return a score of every token of the vocabulary, as s_V, lowest for the likeliest; None without embeddings."""
    embedding: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    name = next((name for name, value in model.named_parameters() if value is embedding.weight), "")
    if name not in update:
        return None
    rows_VI = update[name].detach().double()
    length_V = rows_VI.norm(dim=1)
    head = model.get_output_embeddings()  # type: ignore[operator]
    shared = head is not None and head.weight is embedding.weight
    moved = rows_VI.abs()
    if shared and float(moved.max()) <= LEVEL * float(moved.mean()):
        towards: Tensor = rows_VI @ rows_VI.mean(0) / length_V.clamp(min=1e-30)
        return towards
    return -length_V


def likeliest(scores_V: Tensor) -> list[int]:
    """Return the tokens from the likeliest on."""
    return torch.argsort(scores_V, stable=True).tolist()
