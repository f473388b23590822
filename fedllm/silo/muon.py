"""Muon: a model's inner matrices step by their orthogonalised momentum, all else by AdamW.

Jordan et al. 2024, Muon: An optimizer for hidden layers in neural networks; with the scale of Liu et al. 2025
(arXiv:2502.16982, equation 4), by which a step is as long as AdamW's and one learning rate does for both. As the inner
optimiser of DiLoCo it is MuLoCo (Thérien et al. 2025, arXiv:2505.23725).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.silo.sharded import spread, whole

MOMENTUM = 0.95

QUINTIC, TIMES = (3.4445, -4.7750, 2.0315), 5
"""Of Newton and Schulz's iteration: its polynomial, steepest at 0, and how often it is applied."""

LENGTH = 0.2
"""The root mean square of AdamW's steps, as a rule."""


class Muon(torch.optim.AdamW):
    """AdamW but for `matrices`, which are among its parameters; of these it keeps `exp_avg` and `step` alone."""

    def __init__(self, params: Sequence[nn.Parameter], matrices: Sequence[nn.Parameter], **adamw: Any) -> None:
        super().__init__(params, **adamw)
        self._matrices = matrices

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Take a step; matrices have no gradient after it."""
        (group,) = self.param_groups
        for value in self._matrices:
            if value.grad is None:
                continue
            state = self.state[value]
            if not state:
                state.update(step=torch.tensor(0.0), exp_avg=torch.zeros_like(value))
            state["step"] += 1
            state["exp_avg"].lerp_(value.grad, 1 - MOMENTUM)
            ahead = value.grad.lerp(state["exp_avg"], MOMENTUM)
            away = spread(orthogonal(whole(ahead)), value)
            value.mul_(1 - group["lr"] * group["weight_decay"])
            value.sub_(away, alpha=group["lr"] * LENGTH * math.sqrt(max(value.shape)))
            # What has none is passed over by AdamW.
            value.grad = None
        super().step()


def orthogonal(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values brought near 1, in float32; of zeros it is zeros.

    >>> orthogonal(torch.diag(torch.tensor([3.0, -1.0]))).round(decimals=1)
    tensor([[ 0.8000,  0.0000],
            [ 0.0000, -1.1000]])
    """
    a, b, c = QUINTIC
    wide = matrix.float().mT if matrix.shape[0] > matrix.shape[1] else matrix.float()
    wide = wide / wide.norm().clamp(min=1e-7)
    for _ in range(TIMES):
        gram = wide @ wide.mT
        wide = a * wide + (b * gram + c * gram @ gram) @ wide
    return wide.mT.contiguous() if matrix.shape[0] > matrix.shape[1] else wide


def inner_matrices(model: Any, params: Mapping[str, nn.Parameter]) -> dict[str, nn.Parameter]:
    """Return those of the parameters that are matrices between the model's embeddings and its head."""
    ends = [module for module in model.modules() if isinstance(module, nn.Embedding)]
    ends += [head] if (head := model.get_output_embeddings()) is not None else []
    outside = {id(value) for module in ends for value in module.parameters()}
    return {name: value for name, value in params.items() if value.dim() == 2 and id(value) not in outside}
