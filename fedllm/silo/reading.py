"""What rows have in common is read once: a model's keys and values of a text, kept and gone on from.

Shapes: R rows, T tokens, V vocabulary, H hidden.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.silo.objective import forward_parameters, takes_logits_to_keep


class Read(NamedTuple):
    """What a model has read in each of R rows; more can be read after it, any number of times."""

    cache: Any
    """Keys and values of a transformers model."""
    seen_RT: Tensor
    """True where a place of the cache is text, False where it is padding."""

    def rows(self, places: Sequence[int]) -> Read:
        """Return those rows, in that order, some perhaps several times; what was read stays as it is."""
        index_R = torch.tensor(places, device=self.seen_RT.device)
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in self.cache.layers]
        cache.batch_select_indices(index_R)
        return Read(cache, self.seen_RT[index_R])


def can_go_on(model: Any) -> bool:
    """Say whether a model can go on from what it has read."""
    return {"past_key_values", "position_ids", "attention_mask"} <= forward_parameters(type(plain(model)).forward)


def plain(model: Any) -> Any:
    """Return the model without peft's wrapper; what an adapter put into its layers stays there."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def read_vectors(model: nn.Module, vectors_RTH: Tensor) -> Read:
    """Read rows of embeddings, all of one length: soft prompts."""
    with torch.no_grad():
        kept = {"logits_to_keep": 1} if takes_logits_to_keep(model) else {}
        out = plain(model)(inputs_embeds=vectors_RTH, use_cache=True, **kept)
    return Read(out.past_key_values, torch.ones(vectors_RTH.shape[:2], dtype=torch.bool, device=vectors_RTH.device))


def read(
    model: nn.Module, rows: Sequence[Sequence[int]], before: Read | None, pad_id: int, keep: int
) -> tuple[Tensor, Read]:
    """Read the rows, each of at least one token, after what was read `before` in as many rows.

    Returns float32 logits_RTV from place `keep` of the rows on, and what has now been read. Rows are padded on the
    right: a causal model never looks at what comes after, and what is read later is told to look past it.
    """
    device = next(model.parameters()).device
    lengths, width = [len(row) for row in rows], max(map(len, rows))
    ids_RT = torch.tensor([[*row, *[pad_id] * (width - len(row))] for row in rows], device=device)
    seen_RT = torch.arange(width, device=device) < torch.tensor(lengths, device=device)[:, None]
    kwargs: dict[str, Any] = {"input_ids": ids_RT, "use_cache": True}
    short = takes_logits_to_keep(model)
    if short:
        # As indices, since a slice is not contiguous and the last layer would copy its weights for each row.
        kwargs["logits_to_keep"] = torch.arange(keep - width, 0, device=device)
    if before is not None:
        at_R = before.seen_RT.sum(1)
        seen_RT = torch.cat([before.seen_RT, seen_RT], 1)
        kwargs["past_key_values"] = before.cache
        kwargs["position_ids"] = at_R[:, None] + torch.arange(width, device=device)
        if not bool(before.seen_RT.all()):
            kwargs["attention_mask"] = seen_RT.long()
    with torch.no_grad():
        # With nothing before it the adapter's own wrapper must hear of the rows: it may have a prompt to put there.
        out = (model if before is None else plain(model))(**kwargs)
    logits_RTV = (out.logits if short else out.logits[:, keep:]).float()
    extra = out.past_key_values.get_seq_length() - seen_RT.shape[1]
    if extra > 0:
        seen_RT = torch.cat([seen_RT.new_ones(len(rows), extra), seen_RT], 1)
    return logits_RTV, Read(out.past_key_values, seen_RT)
