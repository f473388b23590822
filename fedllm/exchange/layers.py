"""Which tensors of a model go together: by the number of the layer that stands in their names."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Sequence
from typing import Literal, TypeAlias

from fedllm.core.errors import FedllmError

NUMBER = re.compile(r"(?:^|\.)(\d+)\.")

Groups: TypeAlias = Callable[[Iterable[str]], dict[str, int]]
"""From all names to the group of each; what the names' order is does not matter."""

Embeddings: TypeAlias = Literal["first", "apart"]


def layer_of(name: str) -> int | None:
    """Return the number of the layer that a tensor belongs to, if to any.

    >>> layer_of("model.layers.3.self_attn.q_proj.weight"), layer_of("model.embed_tokens.weight")
    (3, None)
    """
    found = NUMBER.search(name)
    return int(found[1]) if found else None


def by_pattern(count: int, pattern: Literal["strided", "sequential"], embeddings: Embeddings) -> Groups:
    """Group the layers into `count` groups: every `count`-th together, or such as follow each other."""

    def groups(names: Iterable[str]) -> dict[str, int]:
        every = list(names)
        layers = sorted({layer for layer in map(layer_of, every) if layer is not None})
        if len(layers) < count:
            raise FedllmError(
                f"share.count is {count} but what is trained has {len(layers)} layers; set it to at most that, or use "
                "share.name = 'everything'."
            )
        if pattern == "strided":
            lists = [layers[place::count] for place in range(count)]
        else:
            lists = [layers[len(layers) * p // count : len(layers) * (p + 1) // count] for p in range(count)]
        return by_layer(lists, embeddings)(every)

    return groups


def by_layer(lists: Sequence[Sequence[int]], embeddings: Embeddings) -> Groups:
    """Group the layers as the lists say; what belongs to no layer goes with the first list or is a group after all."""
    place = {layer: number for number, layers in enumerate(lists) for layer in layers}
    if twice := [layer for layer in place if sum(layer in layers for layers in lists) > 1]:
        raise FedllmError(f"share.layers has layer {twice[0]} in two fragments; keep it in one.")

    def groups(names: Iterable[str]) -> dict[str, int]:
        every = {name: layer_of(name) for name in names}
        layers = {layer for layer in every.values() if layer is not None}
        if lost := sorted(layers - place.keys()):
            raise FedllmError(
                f"share never visits layer {', '.join(map(str, lost))}; add {'it' if len(lost) == 1 else 'them'} to "
                "one of the lists in share.layers."
            )
        if idle := [number for number, own in enumerate(lists) if not layers & set(own)]:
            raise FedllmError(
                f"share.layers has a fragment without any layer of this model (number {idle[0] + 1}: "
                f"{list(lists[idle[0]])}); take it out."
            )
        outside = 0 if embeddings == "first" else len(lists)
        if embeddings == "apart" and None not in every.values():
            raise FedllmError("share.embeddings is 'apart' but all that is trained is in layers; leave it out.")
        return {name: outside if layer is None else place[layer] for name, layer in every.items()}

    return groups
