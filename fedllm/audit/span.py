"""Tokens and texts out of an update of linear layers, by the span check.

Petrov et al. 2024 (DAGER, arXiv:2405.15586), sections 4 and 5: the gradient of a linear layer's weight is G^T X, so its
rows lie in the span of the layer's inputs X. Of the first layer an input is a function of one token: a token of the
text lies in that span, and any other one outside of it as long as the span is not the whole space. Then a text is put
together token by token: what a later layer is given depends on all tokens so far, so only the right one lies in the
span of that layer's gradient. Learning rate, steps of SGD and clipping change lengths, not spans.

It differs from the paper in three ways: all the layers with one input are taken together (of LoRA the factors A of
queries, keys and values, whose ranks add up); a token's distance is ranked, not held against a threshold, so that noise
makes the attack worse step by step; and one text is built, not a batch of them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from fedllm.audit.layers import Reading, device_of, inputs_of, readings
from fedllm.core.types import Tensors

CHUNK = 4096
"""Tokens of the vocabulary that are looked at at a time."""

FLAT = 3e-6
"""Share of the largest singular value below which a direction is rounding, in float32."""

NEAR = 0.05
"""Relative distance to the span up to which a text goes on."""

BEAM = 4
"""Texts that are built side by side. The first token, repeated, fits for ever: more different tokens come first."""


def span_distances(model: nn.Module, update: Tensors, tokens: int) -> Tensor | None:
    """Return the distance of every token of the vocabulary to the span of the first layer's update, as d_V from 0 to 1.

    `tokens` is how long the attacker takes the text to be: no more directions count. None where no linear layer is
    trained, or the update is 0.
    """
    found = readings(model, update)
    basis_RI = basis(update, found[0], tokens) if found else None
    return None if basis_RI is None else vocabulary_distances(model, found[0], basis_RI)


def vocabulary_distances(model: nn.Module, reading: Reading, basis_RI: Tensor) -> Tensor:
    """Return the distance of each token, standing alone, to a span."""
    vocabulary = model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
    each = []
    for first in range(0, vocabulary, CHUNK):
        ids = torch.arange(first, min(first + CHUNK, vocabulary), device=device_of(model))[:, None]
        each.append(distances(inputs_of(model, reading, ids)[:, 0], basis_RI))
    return torch.cat(each)


def span_text(model: nn.Module, update: Tensors, candidates: Sequence[int], tokens: int) -> list[int]:
    """Return the text that is built from candidate tokens, up to so many, or as far as one of them fits.

    The last token of a text is read by nobody and so is not found.
    """
    found = readings(model, update)
    rows = [sum(update[name].shape[0] for name in reading.names) for reading in found]
    later = [reading for reading, count in zip(found[1:], rows[1:], strict=True) if count >= rows[0]]
    basis_RI = basis(update, later[0], tokens) if later and candidates else None
    if basis_RI is None:
        return []
    alive: list[tuple[float, list[int]]] = [(0.0, [])]
    for _ in range(tokens - 1):
        longer: list[tuple[float, list[int]]] = []
        for so_far, text in alive:
            ids = torch.tensor([[*text, each] for each in candidates], device=device_of(model))
            away = distances(inputs_of(model, later[0], ids)[:, -1], basis_RI).tolist()
            longer += [(so_far + far, [*text, each]) for far, each in zip(away, candidates, strict=True) if far <= NEAR]
        if not longer:
            break
        alive = sorted(longer, key=lambda each: (-len(set(each[1])), each[0]))[:BEAM]
    return alive[0][1]


def basis(update: Tensors, reading: Reading, tokens: int) -> Tensor | None:
    """Return an orthonormal basis_RI of the span of a reading's rows, the strongest directions, `tokens` at most."""
    parts = [update[name].detach().double() for name in reading.names]
    rows_NI = torch.cat([part / part.norm() for part in parts if float(part.norm())] or [parts[0]])
    if not bool(rows_NI.isfinite().all()) or not float(rows_NI.norm()):
        return None
    _, sizes_R, basis_RI = torch.linalg.svd(rows_NI, full_matrices=False)
    count = int((sizes_R > FLAT * sizes_R[0]).sum())
    # Of the whole space nothing is outside; the weakest direction is the likeliest to be noise.
    return basis_RI[: min(count, tokens, reading.width - 1)]


def distances(x_BI: Tensor, basis_RI: Tensor) -> Tensor:
    """Return how far each input is from a span, relative to its own length; one of no length is in no text."""
    length_B = x_BI.norm(dim=-1)
    outside = x_BI - (x_BI @ basis_RI.T) @ basis_RI
    return torch.where(length_B > 0, outside.norm(dim=-1) / length_B.clamp(min=1e-30), 1.0)
