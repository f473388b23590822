"""Which values of an update tell most of the text: a map by which some tensors are encrypted and others not.

FedML-HE (Jin et al. 2023, arXiv:2303.10837), the section on selective parameter encryption: a value w_m is as sensitive
as the mean over K data points of |J_m(y_k)|, with J_m(y) = d/dy (dl(X, y, W)/dw_m). Here a data point is a token y_k in
its text. Cross entropy is linear in the label, l = -sum_v y_v log p_v, so the derivative by the token's own label is
the gradient of that token's loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from fedllm.silo.examples import IGNORED, Example


class Sensitive(NamedTuple):
    """One tensor: what share of all values it has, and what share of their sensitivity."""

    name: str
    values: float
    sensitivity: float


def sensitivity(
    model: nn.Module, params: Mapping[str, Tensor], rows: Iterable[Example], each: int
) -> dict[str, Tensor]:
    """Return of every value of `params` the mean absolute gradient of a token's loss, over `each` tokens of a row.

    The tokens are spread over those that a row is scored on. `params` are the model's own, by the names of an update.
    """
    values, count = list(params.values()), 0
    total = [torch.zeros_like(value) for value in values]
    for row in rows:
        places = spread([place for place, label in enumerate(row.labels) if place and label != IGNORED], each)
        if not places:
            continue
        ids_1T = torch.tensor([row.input_ids], device=values[0].device)
        logits_KV = model(input_ids=ids_1T, use_cache=False).logits[0, [place - 1 for place in places]].float()
        labels_K = torch.tensor([row.labels[place] for place in places], device=ids_1T.device)
        for nll in functional.cross_entropy(logits_KV, labels_K, reduction="none"):
            count += 1
            gradients = torch.autograd.grad(nll, values, retain_graph=True, allow_unused=True)
            for so_far, gradient in zip(total, gradients, strict=True):
                so_far += 0 if gradient is None else gradient.abs()
    return {name: so_far / max(1, count) for name, so_far in zip(params, total, strict=True)}


def spread(places: Sequence[int], most: int) -> Sequence[int]:
    """Return at most so many of the places, as far apart as they go.

    >>> spread([3, 4, 5, 6, 7, 8], 3)
    [3, 5, 7]
    """
    count = min(len(places), most)
    return [places[number * len(places) // count] for number in range(count)]


def by_tensor(found: Mapping[str, Tensor]) -> list[Sensitive]:
    """Return the tensors from the one whose values are the most sensitive on average."""
    whole = sum(value.numel() for value in found.values())
    total = sum(float(value.double().sum()) for value in found.values()) or 1.0
    each = [Sensitive(name, v.numel() / whole, float(v.double().sum()) / total) for name, v in found.items()]
    return sorted(each, key=lambda tensor: (-tensor.sensitivity / tensor.values, tensor.name))


def covering(tensors: Sequence[Sensitive], share: float) -> list[Sensitive]:
    """Return the first of the tensors that together have at least such a share of all values.

    >>> each = [Sensitive(name, 0.04, 0.1) for name in "abc"] + [Sensitive("d", 0.88, 0.7)]
    >>> [tensor.name for tensor in covering(each, 0.1)]
    ['a', 'b', 'c']
    """
    chosen = list[Sensitive]()
    for tensor in tensors:
        if sum(one.values for one in chosen) >= share * (1 - 1e-9):
            break
        chosen.append(tensor)
    return chosen
