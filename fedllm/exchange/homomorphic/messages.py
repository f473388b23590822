"""What travels beside updates: on which terms silos encrypt, and of whom a sum is; all as tensors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.noise import SECRET_BYTES
from fedllm.core.tensors import below, under
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Request
from fedllm.exchange.homomorphic.settings import MOST_SILOS

TRAIN, OPEN = "train", "homomorphic_open"
"""The two phases of a round, as ops: encrypted input, and a sum for some silos to open."""

PART = "homomorphic"
"""Before the names of all tensors here, where they travel beside a model's."""

CIPHER = f"{PART}/cipher"
"""The ciphertexts of an update, or of a sum."""

OPENED = f"{PART}/opened"
"""The numbers of a sum that was opened."""


class Terms(NamedTuple):
    """What all silos of a round encrypt under: from these come the range of the numbers and each silo's tag."""

    round: int
    nonce: bytes
    """The server's, another one in each run and round."""
    asked: int
    """Silos that may be in the sum."""


def written(terms: Terms, **more: Tensor) -> dict[str, Tensor]:
    """Return terms as tensors, with more beside them."""
    nonce = torch.frombuffer(bytearray(terms.nonce), dtype=torch.uint8)
    return under(PART, {"nonce": nonce, "asked": torch.tensor(terms.asked, dtype=torch.int64), **more})


def terms_of(request: Request) -> Terms:
    """Return the terms in a request, or raise `Refused`."""
    part = below(PART, request.tensors)
    nonce, asked = part.get("nonce"), part.get("asked")
    if nonce is None or nonce.dtype != torch.uint8 or tuple(nonce.shape) != (SECRET_BYTES,):
        raise Refused(f"it has no nonce of {SECRET_BYTES} bytes")
    if asked is None or asked.dtype != torch.int64 or asked.dim() or not 1 <= int(asked) <= MOST_SILOS:
        raise Refused("it does not say how many silos were asked")
    return Terms(request.round, bytes(nonce.tolist()), int(asked))


def members(names: Sequence[str]) -> dict[str, Tensor]:
    """Return the silos of a sum as tensors."""
    return under(PART, as_tensors("names", sorted(names)))


def members_of(request: Request, own: str, least: int, terms: Terms) -> list[str]:
    """Return of whom a sum is said to be, or raise `Refused`: each once, in order, this one too, and enough of them."""
    names = texts_in("names", below(PART, request.tensors), MOST_SILOS)
    if names != sorted(set(names)) or own not in names or len(names) > terms.asked:
        raise Refused("the silos of this sum are not each named once, in order, with this one among them")
    if len(names) < least:
        raise Refused(f"a sum of {len(names)} silos is not told, only of {least} or more")
    return names
