"""Whole messages as bytes, for tests: what a process writes to a file and another one reads from it."""

from __future__ import annotations

import tempfile
from pathlib import Path

from fedllm.core.types import Request
from fedllm.runtime.spool import load_message, save_message
from fedllm.runtime.wire import numbers, reply_head, reply_of, request_head


def pack(tensors, head):
    with tempfile.TemporaryDirectory() as folder:
        return save_message(Path(folder, "message"), tensors, head).path.read_bytes()


def unpack(data):
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "message")
        path.write_bytes(data)
        return load_message(path)


def pack_request(request):
    return pack(request.tensors, request_head(request))


def unpack_request(data):
    tensors, head = unpack(data)
    return Request(head["client"], head["round"], head["op"], tensors, numbers(head["scalars"]))


def pack_reply(reply):
    return pack(reply.tensors, reply_head(reply))


def unpack_reply(data):
    return reply_of(*unpack(data))
