"""What a silo remembers of a protocol of several messages a round, so that it answers each of them once.

`part` names a protocol: before the names of its tensors, where they travel beside a model's, and of what it remembers.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.noise import digest
from fedllm.core.tensors import below, under
from fedllm.core.types import Request, Silo, Tensors


def without_ours(part: str, request: Request) -> Request:
    """Return the request as the inner client knows it."""
    plain = {name: value for name, value in request.tensors.items() if not name.startswith(f"{part}/")}
    return request._replace(tensors=plain)


def answered(part: str, request: Request, silo: Silo) -> Tensors:
    """Return what this silo answered to this request before, or nothing if it was not asked yet.

    Raises:
        Refused: for another request of a round that was answered, or of an earlier one: two answers tell more than one.
    """
    where = f"{part}/answered.{request.op}"
    if where not in silo.memory:
        return {}
    last, seen = silo.memory[where], mark(part, request)
    number = int.from_bytes(bytes(last[:8].tolist()), "big")
    if number < request.round:
        return {}
    said = below(f"{where}:said", silo.memory)
    if number > request.round or not torch.equal(last, seen) or not said:
        raise Refused(f"'{request.op}' of round {request.round + 1} was answered here, and is answered once")
    return said


def remembering(part: str, request: Request, silo: Silo, said: Tensors) -> dict[str, Tensor]:
    """Return the silo's memory with what it answers now."""
    where = f"{part}/answered.{request.op}"
    rest = {name: value for name, value in silo.memory.items() if not name.startswith(where)}
    return {**rest, where: mark(part, request), **under(f"{where}:said", said)}


def trained(part: str, request: Request, silo: Silo, kept: Tensors) -> dict[str, Tensor]:
    """Return the silo's memory after training: what the inner client keeps, and that it was asked."""
    before = {name: value for name, value in silo.memory.items() if name.startswith(f"{part}/")}
    return {**kept, **before, **remembering(part, request, silo._replace(memory={}), {})}


def mark(part: str, request: Request) -> Tensor:
    """Return round and digest of a request; of a training request of our own part only, since it is answered once."""
    ours = {name: value for name, value in sorted(request.tensors.items()) if name.startswith(f"{part}/")}
    whole = request.round.to_bytes(8, "big") + digest(ours)
    return torch.frombuffer(bytearray(whole), dtype=torch.uint8)
