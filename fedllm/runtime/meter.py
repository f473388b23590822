"""Count what crosses the wire, both ways, and the time that the clients take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from fedllm.core.types import Exchange, Reply, Request
from fedllm.runtime.wire import message_bytes, reply_head, request_head


@dataclass
class Traffic:
    """Bytes sent to the clients (`down`) and received from them (`up`), and seconds spent waiting for them."""

    down: int = 0
    up: int = 0
    seconds: float = 0.0


def metered(exchange: Exchange, traffic: Traffic) -> Exchange:
    """Add to `traffic` the exact bytes that each message takes, or would take, on the wire."""

    def counting(requests: Sequence[Request]) -> Iterator[Reply]:
        payload = {}
        for request in requests:
            # The same tensors go to many clients: their part of the message is measured once.
            key = id(request.tensors)
            if key not in payload:
                payload[key] = message_bytes(request.tensors, {}) - message_bytes({}, {})
            traffic.down += payload[key] + message_bytes({}, request_head(request))
        replies, begun = exchange(requests), time.perf_counter()
        for reply in replies:
            traffic.seconds += time.perf_counter() - begun
            traffic.up += message_bytes(reply.tensors, reply_head(reply))
            yield reply
            begun = time.perf_counter()
        traffic.seconds += time.perf_counter() - begun

    return counting
