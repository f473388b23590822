"""Messages as bytes: safetensors with a JSON header, never pickle; nothing that a peer says is trusted."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from functools import lru_cache
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

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


def pack(tensors: Tensors, head: Mapping[str, Any]) -> bytes:
    """Return tensors and a JSON-able head as one safetensors message; bf16 stays bf16."""
    own = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
    return save(own, {"fedllm": json.dumps(head, sort_keys=True)})


def unpack(data: bytes) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return the tensors and the head of a message, or raise `Refused`."""
    try:
        size = int.from_bytes(data[:8], "little")
        head = json.loads(json.loads(data[8 : 8 + size])["__metadata__"]["fedllm"])
        tensors = load(data)
    except (SafetensorError, ValueError, KeyError, TypeError, OverflowError, RecursionError) as error:
        raise Refused(f"its bytes are not a message ({type(error).__name__})") from error
    if not isinstance(head, dict):
        raise Refused("the head of its message is not an object")
    return tensors, head


def pack_request(request: Request) -> bytes:
    """Return a request as bytes."""
    return pack(request.tensors, request_head(request))


def unpack_request(data: bytes) -> Request:
    """Return the request in a message, or raise `Refused`."""
    tensors, head = unpack(data)
    try:
        return Request(str(head["client"]), int(head["round"]), str(head["op"]), tensors, numbers(head["scalars"]))
    except (KeyError, TypeError, ValueError, OverflowError, RecursionError) as error:
        raise Refused(f"its message is not a request ({error})") from error


def pack_reply(reply: Reply) -> bytes:
    """Return a reply as bytes."""
    return pack(reply.tensors, reply_head(reply))


def unpack_reply(data: bytes) -> Reply:
    """Return the reply in a message, or raise `Refused`."""
    return reply_of(*unpack(data))


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
    """Return the length of `pack(tensors, head)` without making it."""
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
