"""Which trained layers see the text first, and what they are given for it: what attacks compare updates with."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.core.types import Tensors


class Reading(NamedTuple):
    """Layers that are given the same input, by the names of their weights in an update."""

    names: Sequence[str]
    width: int


class _Enough(Exception):
    """The input that was looked for is there."""


def readings(model: nn.Module, like: Tensors) -> list[Reading]:
    """Return the trained linear layers in the order in which they read, those with one input together.

    Of LoRA these are the factors A. A layer whose weight is not in the update `like` is none.
    """
    modules = linear(model, like)
    called: list[tuple[str, Tensor]] = []

    def note(name: str) -> Any:
        # The tensor is kept, so that no other one can take its place in memory.
        return lambda module, given: called.append((name, given[0]))

    with hooked([(module, note(name)) for name, module in modules.items()]), torch.no_grad():
        model(input_ids=torch.zeros(1, 2, dtype=torch.long, device=device_of(model)), use_cache=False)
    groups: list[tuple[int, list[str], int]] = []
    for name, given in called:
        key = given.data_ptr()
        if groups and groups[-1][0] == key:
            groups[-1][1].append(name)
        else:
            groups.append((key, [name], given.shape[-1]))
    return [Reading(names, width) for _, names, width in groups]


def linear(model: nn.Module, like: Tensors) -> dict[str, nn.Module]:
    """Return the linear layers whose weights are in an update, by the names of those; LoRA's B read nothing of it."""
    found = dict[str, nn.Module]()
    for name, module in model.named_modules():
        weight = f"{name}.weight"
        if weight in like and isinstance(module, nn.Linear) and ".lora_B." not in weight and "lm_head" not in weight:
            found[weight] = module
    return found


def inputs_of(model: nn.Module, reading: Reading, ids_BT: Tensor) -> Tensor:
    """Return what the layers of a reading are given for rows of tokens, as x_BTI in float64; no later layer runs."""
    modules = dict(model.named_modules())
    module = modules[reading.names[0].removesuffix(".weight")]
    kept: list[Tensor] = []

    def stop(module: nn.Module, given: tuple[Tensor, ...]) -> None:
        kept.append(given[0].detach().double())
        raise _Enough

    with hooked([(module, stop)]), torch.no_grad(), suppress(_Enough):
        model(input_ids=ids_BT, use_cache=False)
    return kept[0]


@contextmanager
def hooked(pairs: Sequence[tuple[nn.Module, Any]]) -> Iterator[None]:
    """Let functions look at what modules are given."""
    handles = [module.register_forward_pre_hook(function) for module, function in pairs]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def device_of(model: nn.Module) -> torch.device:
    """Return where a model is."""
    return next(model.parameters()).device
