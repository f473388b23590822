"""What travels beside updates: who takes part with which keys, who is left, boxes and shares; all as tensors."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.tensors import below, under
from fedllm.core.texts import MOST, as_tensors, texts_in
from fedllm.core.types import Tensors
from fedllm.exchange.secure.keys import BOX_BYTES, KEY_BYTES
from fedllm.exchange.secure.settings import Settings

KEYS, SHARES, TRAIN, SUM = "secure_keys", "secure_shares", "train", "secure_sum"
"""The four phases of a round, as ops: advertise keys, share keys, masked input, unmask."""

PART = "secure"
"""Before the names of all tensors here, where they travel beside a model's."""

TAIL = f"{PART}/tail"
"""Beside a masked update, also masked: the numbers that `beside` makes."""


class Directory(NamedTuple):
    """The silos of a round in the order of their names, each with its two public keys."""

    names: Sequence[str]
    channel: Sequence[bytes]
    mask: Sequence[bytes]
    asked: int
    """Silos that were asked for keys: those that sent none are lost already."""

    def place(self, name: str) -> int:
        """Return a silo's place, or raise `Refused`."""
        if name not in self.names:
            raise Refused(f"'{name}' is not among the silos of this sum")
        return list(self.names).index(name)


def context_of(directory: Directory, number: int, settings: Settings) -> bytes:
    """Return the hash to which all keys of a round are bound: round, settings, silos and their public keys."""
    hashed = hashlib.sha256(b"fedllm secure context")
    # A default of 10 and a recipe's 10.0 are one number: a run that is resumed must not make other masks, or noise.
    numbers = [None if each is None else float(each) for each in (number, directory.asked, *settings)]
    for part in (repr(numbers).encode(), *[each.encode() for each in directory.names]):
        hashed.update(len(part).to_bytes(8, "big") + part)
    hashed.update(b"".join([*directory.channel, *directory.mask]))
    return hashed.digest()


def as_bytes(value: Tensor | None, rows: int, size: int, what: str) -> list[bytes]:
    """Return the rows of a byte tensor, or raise `Refused` where it is not so many of that size."""
    if value is None or value.dtype != torch.uint8 or tuple(value.shape) != (rows, size):
        raise Refused(f"its {what} are not {rows} times {size} bytes")
    whole = value.contiguous().numpy().tobytes()
    return [whole[place : place + size] for place in range(0, rows * size, size)]


def as_tensor(rows: Sequence[bytes], size: int) -> Tensor:
    """Return rows of bytes as a tensor."""
    return torch.frombuffer(bytearray(b"".join(rows)), dtype=torch.uint8).view(-1, size) if rows else empty(size)


def empty(size: int) -> Tensor:
    """Return no rows."""
    return torch.zeros(0, size, dtype=torch.uint8)


def written(directory: Directory, **more: Tensor) -> dict[str, Tensor]:
    """Return a directory as tensors, with more beside it."""
    keys = as_tensor([*directory.channel, *directory.mask], KEY_BYTES)
    asked = torch.tensor(directory.asked, dtype=torch.int64)
    return under(PART, {**as_tensors("names", directory.names), "keys": keys, "asked": asked, **more})


def read_directory(tensors: Tensors, own: str, public: tuple[bytes, bytes]) -> Directory:
    """Return the directory in a request, or raise `Refused`: in order, each silo once, this one with its own keys."""
    part = below(PART, tensors)
    names = texts_in("names", part)
    keys, asked = as_bytes(part.get("keys"), 2 * len(names), KEY_BYTES, "keys"), part.get("asked")
    if asked is None or asked.dtype != torch.int64 or asked.dim() or not len(names) <= int(asked) <= MOST:
        raise Refused("it does not say how many silos were asked")
    found = Directory(names, keys[: len(names)], keys[len(names) :], int(asked))
    if names != sorted(set(names)):
        raise Refused("the silos of this sum are not each named once, in order")
    if len(set(keys)) < len(keys):
        raise Refused("two keys of the silos of this sum are the same")
    place = found.place(own)
    if (found.channel[place], found.mask[place]) != public:
        raise Refused("the keys that the server says are this silo's are not")
    return found


def flags(chosen: Mapping[int, object] | set[int], count: int) -> Tensor:
    """Return a set of places as bytes of 0 and 1."""
    return torch.tensor([place in chosen for place in range(count)], dtype=torch.uint8)


def chosen_of(tensors: Tensors, key: str, count: int) -> set[int]:
    """Return the places in a request that are flagged under a key, or raise `Refused`."""
    value = below(PART, tensors).get(key)
    if value is None or value.dtype != torch.uint8 or tuple(value.shape) != (count,) or int(value.max()) > 1:
        raise Refused(f"its '{key}' are not {count} flags")
    return {place for place, there in enumerate(value.tolist()) if there}


def boxes_of(tensors: Tensors, rows: int) -> list[bytes]:
    """Return the boxes in a message, or raise `Refused`."""
    return as_bytes(tensors.get(f"{PART}/boxes"), rows, BOX_BYTES, "boxes")
