"""The exchange inside one process: clients one by one, or a round's clients as batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, MutableMapping, Sequence
from typing import TypeAlias

from fedllm.core.types import Client, Cohort, Exchange, Reply, Request, Silo, Tensors

Open: TypeAlias = Callable[[str], Silo]
"""Opens the silo of that name, without its memory."""

Memory: TypeAlias = MutableMapping[str, Tensors]
"""What each node remembers, by silo; a stand-in for the nodes' own disks."""


def local(client: Client, open_silo: Open, memory: Memory) -> Exchange:
    """Run the clients one after another, in the order of the requests."""

    def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
        for request in requests:
            silo = open_silo(request.client)
            reply, kept = client(request, silo._replace(memory=memory.get(request.client, {})))
            remember(memory, request.client, kept)
            yield reply

    return exchange


def cohort(clients: Cohort, open_silo: Open, memory: Memory, width: int) -> Exchange:
    """Run up to `width` clients as one batch, in the order of the requests."""

    def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
        for start in range(0, len(requests), width):
            group = requests[start : start + width]
            members = [
                (request, open_silo(request.client)._replace(memory=memory.get(request.client, {})))
                for request in group
            ]
            for reply, kept in clients(members):
                remember(memory, reply.client, kept)
                yield reply

    return exchange


def by_op(exchanges: dict[str, Exchange]) -> Exchange:
    """Send each request to the exchange that is there for its `op`."""

    def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
        for op in dict.fromkeys(request.op for request in requests):
            yield from exchanges[op]([request for request in requests if request.op == op])

    return exchange


def remember(memory: Memory, name: str, kept: Tensors) -> None:
    """Keep a node's new memory, or nothing if it has none."""
    if kept:
        memory[name] = kept
    else:
        memory.pop(name, None)
