"""One model over several processes: FSDP2 shards its weights, gradients and optimiser state by their first dimension.

Zhao et al. 2023, PyTorch FSDP (arXiv:2304.11277), as `torch.distributed.fsdp.fully_shard`. A sharded parameter knows
its processes, so training needs no other sign: it takes its share of a batch's rows, and sums what is summed over all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.core.types import Tensors


class Part(NamedTuple):
    """The part that one of `size` processes has in training one model."""

    rank: int = 0
    size: int = 1
    total: Callable[[Tensor], Tensor] = lambda value: value
    """The sum of a plain tensor over all processes."""


ALONE = Part()


def part_of(params: Mapping[str, Tensor]) -> Part:
    """Return this process's part in the training of such parameters."""
    mesh: Any = getattr(next(iter(params.values())), "device_mesh", None)
    if mesh is None:
        return ALONE

    def total(value: Tensor) -> Tensor:
        whole = value.clone()
        torch.distributed.all_reduce(whole, group=mesh.get_group())
        return whole

    return Part(mesh.get_local_rank(), mesh.size(), total)


def shard(model: nn.Module, device: torch.device, count: int) -> nn.Module:
    """Shard a model over `count` processes, layer by layer; each keeps its shards on its device."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    mesh = init_device_mesh(device.type, (count,))
    # A layer's weights are whole in one process only while it computes.
    for group in [each for each in model.modules() if isinstance(each, nn.ModuleList) and is_layers(each, model)]:
        for layer in group:
            fully_shard(layer, mesh=mesh)
    fully_shard(model, mesh=mesh)
    return model


def is_layers(group: nn.ModuleList, model: Any) -> bool:
    """Say whether a list of modules is that of the model's layers."""
    return len(group) == getattr(model.config, "num_hidden_layers", -1)


def own(value: Tensor) -> Tensor:
    """Return this process's shard of a tensor, or all of one that is not sharded; changes of it are the tensor's."""
    return value.to_local() if hasattr(value, "to_local") else value


def spread(value: Tensor, like: Any) -> Tensor:
    """Return a whole tensor, the same in all processes, sharded as another one is."""
    if not hasattr(like, "placements"):
        return value
    from torch.distributed.tensor import distribute_tensor

    return distribute_tensor(value.detach(), like.device_mesh, like.placements, src_data_rank=None)


def whole(value: Any) -> Tensor:
    """Return a tensor of which this process may have a shard only; all processes take part."""
    full: Tensor = value.full_tensor() if hasattr(value, "full_tensor") else value
    return full


def gathered(tensors: Tensors) -> dict[str, Tensor]:
    """Return sharded tensors whole in the first process, one after the other, and nothing in all others."""
    if not any(hasattr(value, "full_tensor") for value in tensors.values()):
        return dict(tensors)
    found = dict[str, Tensor]()
    for name, value in tensors.items():
        # Only the first keeps what came together.
        full = whole(value)
        if torch.distributed.get_rank() == 0:
            found[name] = full.cpu()
    return found
