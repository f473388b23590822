"""Messages as files: tensors and a JSON head in one safetensors file, written and read in the memory of one payload."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from io import BufferedReader
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.types import Tensors
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
    try:
        with path.open("rb") as file:
            listed = int.from_bytes(file.read(8), "little")
            if listed > LARGEST_HEADER:
                raise Refused(f"its message lists its tensors in {listed} bytes, more than {LARGEST_HEADER}")
            with safe_open(path, "pt") as message:
                text = message.metadata()["fedllm"]
                if len(text) > LARGEST_HEAD:
                    raise Refused(f"the head of its message has {len(text)} bytes, more than {LARGEST_HEAD}")
                head = json.loads(text)
                names = head.pop("names", [])
                file.seek(8 + listed)
                # By reading and not by mapping: mapped pages would count as memory a second time.
                tensors = {name: read_tensor(file, message.get_slice(name)) for name in message.offset_keys()}
        return {name: tensors[name] for name in names} | tensors, head
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError, OverflowError) as error:
        raise Refused(f"its bytes are not a message ({type(error).__name__})") from error


def read_tensor(file: BufferedReader, listed: Any) -> Tensor:
    """Return the tensor that lies at the file's place, of the dtype and shape that the message lists for it."""
    tensor = torch.empty(listed.get_shape(), dtype=DTYPES[listed.get_dtype()])
    raw = tensor.view(-1).view(torch.uint8)
    if file.readinto(raw.numpy().data) != raw.numel():
        raise ValueError("the file ends within a tensor")
    # Any byte may stand for a bool in a file; torch knows 0 and 1.
    return tensor.view(torch.uint8).ne(0) if tensor.dtype == torch.bool else tensor


def sha256_of(path: Path) -> str:
    """Return the sha256 of a file's bytes in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
