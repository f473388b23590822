"""Many clients' adapters inside one frozen base, so that a round trains as one batch.

Every shared matmul is then one large matmul, and only the low-rank part is a batched one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn

from fedllm.core.types import Tensors
from fedllm.silo.trainables import trained


class StackedLinear(nn.Module):
    """C linear maps without bias, each for its own rows; rows are grouped by client."""

    def __init__(self, weight_COI: Tensor) -> None:
        super().__init__()
        self.weight = nn.Parameter(weight_COI)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Map [C * b, T, I] to [C * b, T, O]."""
        clients, out, inner = self.weight.shape
        y = torch.bmm(x_BTI.reshape(clients, -1, inner), self.weight.mT)
        return y.view(*x_BTI.shape[:-1], out)


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the model's LoRA layers by name."""
    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def stackable(model: nn.Module) -> bool:
    """Say whether all that the model trains is plain LoRA on linear layers, without dropout.

    DoRA's magnitudes depend on the dense product of each client, and dropout draws from one generator.
    """
    layers = lora_layers(model)
    plain = all(
        not any(layer.use_dora.values()) and all(isinstance(d, nn.Identity) for d in layer.lora_dropout.values())
        for layer in layers.values()
    )
    halves = {f"{name}.lora_{half}.default.weight" for name in layers for half in "AB"}
    return bool(layers) and plain and trained(model).keys() == halves


@contextmanager
def stacked(model: nn.Module, values: Tensors) -> Iterator[Mapping[str, nn.Parameter]]:
    """Put stacked adapters `values` (name -> [C, ...]) into a stackable model; yield them as parameters."""
    own, params = {}, {}
    for name, layer in lora_layers(model).items():
        for half in "AB":
            maps, key = getattr(layer, f"lora_{half}"), f"{name}.lora_{half}.default.weight"
            own[key] = maps["default"]
            maps["default"] = StackedLinear(values[key].clone())
            params[key] = maps["default"].weight
    try:
        yield params
    finally:
        for name, layer in lora_layers(model).items():
            for half in "AB":
                getattr(layer, f"lora_{half}")["default"] = own[f"{name}.lora_{half}.default.weight"]
