"""Count what crosses the wire, both ways, and the time that the clients take."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from fedllm.core.types import Aside, Exchange, Reply, Request
from fedllm.runtime.wire import message_bytes, reply_head, request_head


@dataclass
class Traffic:
    """Bytes sent to the clients (`down`) and received from them (`up`), and seconds spent waiting for them.

    `each` has the bytes of every client, down and up.
    """

    down: int = 0
    up: int = 0
    seconds: float = 0.0
    each: dict[str, list[int]] = field(default_factory=dict)

    def count(self, client: str, down: int, up: int) -> None:
        """Add what one message took."""
        self.down, self.up = self.down + down, self.up + up
        so_far = self.each.setdefault(client, [0, 0])
        so_far[0], so_far[1] = so_far[0] + down, so_far[1] + up


def metered(exchange: Exchange, traffic: Traffic) -> Exchange:
    """Add to `traffic` the exact bytes that each message takes, or would take, on the wire."""

    def counting(requests: Sequence[Request]) -> Iterator[Reply]:
        payload = {}
        for request in requests:
            # The same tensors go to many clients: their part of the message is measured once.
            key = id(request.tensors)
            if key not in payload:
                payload[key] = message_bytes(request.tensors, {}) - message_bytes({}, {})
            traffic.count(request.client, payload[key] + message_bytes({}, request_head(request)), 0)
        replies, begun = exchange(requests), time.perf_counter()
        for reply in replies:
            traffic.seconds += time.perf_counter() - begun
            sent = reply.tensors.like if isinstance(reply.tensors, Aside) else reply.tensors
            traffic.count(reply.client, 0, message_bytes(sent, reply_head(reply)))
            yield reply
            begun = time.perf_counter()
        traffic.seconds += time.perf_counter() - begun

    return counting
