"""Messages as files: tensors and a JSON head in one safetensors file, written and read in the memory of one payload."""

from __future__ import annotations

import hashlib
import json
import os
import weakref
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.room import room_for
from fedllm.core.types import Aside, Tensors
from fedllm.runtime.line import LARGEST_HEAD
from fedllm.runtime.wire import CODES

LARGEST_HEADER = 10_000_000
"""Bytes that may list a message's tensors: some 100,000 of them; parsed, they take many times that."""

DTYPES = {code: dtype for dtype, code in CODES.items()}


class Stored(NamedTuple):
    """A file on its way: where it lies, the sha256 of its bytes (hex) and their number."""

    path: Path
    key: str
    size: int


def save_message(path: Path, tensors: Tensors, head: Mapping[str, Any]) -> Stored:
    """Write tensors and a JSON-able head to a file; the same tensors in the same order give the same bytes.

    Raises:
        OSError, SafetensorError: if the file cannot be written.
    """
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    # A file gives its tensors by name; a norm over all of them needs the order they had, to the last bit.
    save_file(own, path, {"fedllm": json.dumps({**head, "names": list(own)}, sort_keys=True)})
    return Stored(path, sha256_of(path), path.stat().st_size)


def load_message(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors, in the order they had, and the head of a message; raise `Refused` if it is none."""
    tensors, head = open_message(path)
    return dict(tensors), head


def open_message(path: Path) -> tuple[Aside, dict[str, Any]]:
    """Return the tensors of a message, in the order they had, which stay in the file, and its head.

    The file is open for as long as they are there, so that its name may go before.

    Raises:
        Refused: if it is no message; of a tensor, if the file was changed or cannot be read.
    """
    with ExitStack() as until_known:
        file = until_known.enter_context(path.open("rb"))
        with refusing():
            known = mark(file)
            like, places, head = listed(path, file)

        def read_at(place: int, kind: Tensor) -> Tensor:
            try:
                with refusing():
                    if mark(file) != known:
                        raise Refused("its file was changed after it came")
                    file.seek(place)
                    return read_tensor(file, kind)
            except OSError as error:
                raise Refused(f"its file cannot be read any more ({error.strerror})") from error

        def read(name: str) -> Tensor:
            return read_at(places[name], like[name])

        def cut(name: str, start: int, stop: int) -> Tensor:
            part = torch.empty(stop - start, dtype=like[name].dtype, device="meta")
            return read_at(places[name] + start * part.itemsize, part)

        tensors = Aside(like, read, cut)
        weakref.finalize(tensors, until_known.pop_all().close)
    return tensors, head


def listed(path: Path, file: BufferedReader) -> tuple[dict[str, Tensor], dict[str, int], dict[str, Any]]:
    """Return what a message lists: its tensors without their numbers, the place of each in the file, and the head."""
    size = int.from_bytes(file.read(8), "little")
    if size > LARGEST_HEADER:
        raise Refused(f"its message lists its tensors in {size} bytes, more than {LARGEST_HEADER}")
    like, places, place = dict[str, Tensor](), dict[str, int](), 8 + size
    with safe_open(path, "pt") as message:
        text = message.metadata()["fedllm"]
        if len(text) > LARGEST_HEAD:
            raise Refused(f"the head of its message has {len(text)} bytes, more than {LARGEST_HEAD}")
        for name in message.offset_keys():
            own = message.get_slice(name)
            like[name] = torch.empty(own.get_shape(), dtype=DTYPES[own.get_dtype()], device="meta")
            # One lies behind the other without a gap, or it would not have been opened.
            places[name], place = place, place + like[name].nbytes
    head = json.loads(text)
    return {name: like[name] for name in head.pop("names", [])} | like, places, head


def mark(file: BufferedReader) -> tuple[int, int]:
    """Return what changes when a file is written to."""
    told = os.fstat(file.fileno())
    return told.st_size, told.st_mtime_ns


@contextmanager
def refusing() -> Iterator[None]:
    """Refuse bytes that are not a message."""
    try:
        yield
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise Refused(f"its bytes are not a message ({type(error).__name__})") from error


def read_tensor(file: BufferedReader, like: Tensor) -> Tensor:
    """Return the tensor that lies at the file's place: by reading and not by mapping, which would count as memory."""
    tensor = room_for(like, "cpu")
    raw = tensor.view(-1).view(torch.uint8)
    if file.readinto(raw.numpy().data) != raw.numel():
        raise ValueError("the file ends within a tensor")
    # Any byte may stand for a bool in a file; torch knows 0 and 1.
    return tensor.view(torch.uint8).ne(0) if tensor.dtype == torch.bool else tensor


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
