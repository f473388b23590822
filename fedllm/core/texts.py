"""Texts as tensors, so that they travel like everything else: UTF-8 bytes end to end, and where each text ends."""

from __future__ import annotations

import unicodedata
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.types import Tensors

MOST = 1 << 16
"""Texts of one name in a message; more is refused."""

LONGEST = 1 << 20
"""Bytes of all texts of one name together; more is refused."""


def as_tensors(name: str, texts: Sequence[str]) -> dict[str, Tensor]:
    """Return texts as two tensors, `NAME.utf8` (uint8) and `NAME.ends` (int64); control characters become spaces.

    >>> as_tensors("said", ["no", "yes"])["said.ends"]
    tensor([2, 5])
    """
    each = [printable(text).encode("utf-8", "replace") for text in texts]
    ends = torch.tensor([len(data) for data in each], dtype=torch.int64).cumsum(0)
    return {f"{name}.utf8": torch.tensor(list(b"".join(each)), dtype=torch.uint8), f"{name}.ends": ends}


def texts_in(name: str, tensors: Tensors, most: int = MOST, longest: int = LONGEST) -> list[str]:
    """Return the texts that travelled under a name, at most so many of so many bytes together.

    Raises:
        Refused: for whatever is not the tensors that `as_tensors` makes.
    """
    data, ends = tensors.get(f"{name}.utf8"), tensors.get(f"{name}.ends")
    if data is None or ends is None:
        raise Refused(f"it has no texts under '{name}'")
    if data.dtype != torch.uint8 or ends.dtype != torch.int64 or data.dim() != 1 or ends.dim() != 1:
        raise Refused(f"its '{name}' are not texts")
    if len(ends) > most or len(data) > longest:
        raise Refused(f"its '{name}' are {len(ends)} texts of {len(data)} bytes; {most} of {longest} are taken")
    places = [0, *ends.tolist()]
    if places[-1] != len(data) or any(after < before for before, after in pairwise(places)):
        raise Refused(f"its '{name}' do not end where they say")
    whole = bytes(data.tolist())
    try:
        texts = [whole[start:end].decode("utf-8") for start, end in pairwise(places)]
    except UnicodeDecodeError:
        raise Refused(f"its '{name}' are not UTF-8") from None
    if any(text != printable(text) for text in texts):
        raise Refused(f"its '{name}' have control characters")
    return texts


def printable(text: str) -> str:
    """Return the text with a space for every control character but tabs and line ends: a terminal would obey them.

    >>> printable("a\\x1b[2Jb\\n")
    'a [2Jb\\n'
    """
    return "".join(
        " " if unicodedata.category(character) in ("Cc", "Cs") and character not in "\t\n" else character
        for character in text
    )
