"""What a message says beside its tensors, and the bytes it takes; nothing that a peer says is trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch

from fedllm.core.errors import Refused
from fedllm.core.types import Reply, Request, Scalars, Tensors

CODES = {
    torch.int64: "I64",
    torch.float64: "F64",
    torch.float32: "F32",
    torch.int32: "I32",
    torch.bfloat16: "BF16",
    torch.float16: "F16",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
"""The types that travel, in the order in which safetensors lays them out."""

ORDER = {dtype: place for place, dtype in enumerate(CODES)}


def reply_of(tensors: Tensors, head: Mapping[str, Any]) -> Reply:
    """Return the reply of these tensors and this head, or raise `Refused`."""
    try:
        return Reply(str(head["client"]), int(head["round"]), tensors, float(head["weight"]), numbers(head["scalars"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Refused(f"its message is not a reply ({error})") from error


def numbers(scalars: Any) -> Scalars:
    """Return the scalars of a head as floats."""
    if not isinstance(scalars, dict):
        raise ValueError("its scalars are not an object")
    return {str(key): float(value) for key, value in scalars.items()}


def request_head(request: Request) -> dict[str, Any]:
    """Return what a request's message says beside its tensors."""
    return {
        "client": request.client,
        "round": request.round,
        "op": request.op,
        "scalars": dict(request.scalars),
    }


def reply_head(reply: Reply) -> dict[str, Any]:
    """Return what a reply's message says beside its tensors."""
    return {
        "client": reply.client,
        "round": reply.round,
        "weight": reply.weight,
        "scalars": dict(reply.scalars),
    }


def message_bytes(tensors: Tensors, head: Mapping[str, Any]) -> int:
    """Return the length of a message of these tensors and this head without making it."""
    listed, payload = layout(tuple((name, value.dtype, value.shape) for name, value in tensors.items()))
    text = json.dumps({"__metadata__": {"fedllm": json.dumps(head, sort_keys=True)}}, separators=(",", ":"))
    return 8 + 8 * math.ceil((len(text) + listed) / 8) + payload


@lru_cache(maxsize=64)
def layout(entries: tuple[tuple[str, torch.dtype, torch.Size], ...]) -> tuple[int, int]:
    """Return the bytes of the tensors' part of a message's header, and those of their numbers."""
    listed, place = {}, 0
    # safetensors lays tensors out by its own order of types, then by name.
    for name, dtype, shape in sorted(entries, key=lambda entry: (ORDER[entry[1]], entry[0])):
        end = place + shape.numel() * dtype.itemsize
        listed[name] = {"dtype": CODES[dtype], "shape": list(shape), "data_offsets": [place, end]}
        place = end
    text = json.dumps(listed, separators=(",", ":"), ensure_ascii=False).encode()
    # Of its two braces and the comma that joins it to the rest, one byte is left.
    return (len(text) - 1 if listed else 0), place
