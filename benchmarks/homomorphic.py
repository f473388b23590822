"""Homomorphic sums: seconds, bytes and error beside a plain sum and a secure one, for updates of several sizes.

Silos one after another in this process, without training; all of the update encrypted, and a tenth of it.

    python -m benchmarks.homomorphic
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Annotated, Any, NamedTuple

import torch
import typer

from benchmarks.common import keep, summing_silos
from fedllm.core.types import Middleware, Reply, Request, Tensors
from fedllm.exchange.homomorphic.middleware import homomorphic_sum
from fedllm.exchange.homomorphic.settings import Settings
from fedllm.exchange.secure.fixed_point import grid
from fedllm.exchange.secure.middleware import secure_sum
from fedllm.exchange.secure.settings import Settings as SecureSettings
from fedllm.runtime.wire import message_bytes, reply_head

BOUND, KEY, SECRET = 1.0, b"k" * 32, b"s" * 32


class Cost(NamedTuple):
    """What one round came to."""

    error: float
    """Largest difference of the mean from the plain one."""
    silo_s: float
    """CPU seconds of one silo: the most of any."""
    server_s: float
    """CPU seconds of the server."""
    bytes_ratio: float
    """Bytes from and to one silo beside the weights, over those of its update as float32: the most of any."""


def update_of(place: int, like: Tensors) -> dict[str, torch.Tensor]:
    """Return an update of norm 1 at most, of which every value counts."""
    drawn = torch.Generator().manual_seed(place)
    made = {name: torch.randn(value.shape, generator=drawn) for name, value in like.items()}
    norm = sum(float(value.square().sum()) for value in made.values()) ** 0.5
    return {name: value * (0.99 * BOUND / norm) for name, value in made.items()}


def cost_of(layer: Middleware, like: Tensors, silos: int) -> Cost:
    """Do one round and measure it."""
    names = [f"silo_{place}" for place in range(silos)]
    updates = {name: update_of(place, like) for place, name in enumerate(names)}
    exchange, spent, sent = summing_silos(layer, updates)
    begun = time.process_time()
    (reply,) = layer.exchange(exchange)([Request(name, 0, "train", {}) for name in names])
    server = time.process_time() - begun - sum(spent.values())
    assert list(reply.of) == names, reply.lost
    error = max(
        float((reply.tensors[key].double() - sum(updates[name][key].double() for name in names) / silos).abs().max())
        for key in like
    )
    bare = message_bytes(updates[names[0]], reply_head(Reply(names[0], 0, {}, 1.0)))
    return Cost(error, max(spent.values()), server, max(sent.values()) / bare)


def plain(like: Tensors, silos: int) -> float:
    """Return the CPU seconds in which a server adds the same updates up."""
    updates = [update_of(place, like) for place in range(silos)]
    begun = time.process_time()
    total = {name: torch.zeros(value.shape, dtype=torch.float64) for name, value in like.items()}
    for update in updates:
        for name, value in update.items():
            total[name] += value
    return time.process_time() - begun


def ways(like: Tensors) -> dict[str, Callable[[], Middleware]]:
    """Return what is compared, by name."""

    def homomorphic(**changes: Any) -> Callable[[], Middleware]:
        return lambda: homomorphic_sum(Settings(**changes), KEY, SECRET, BOUND, lambda number: like, weighted=False)

    return {
        "homomorphic_32": homomorphic(),
        "homomorphic_16": homomorphic(bits=16),
        "homomorphic_tenth": homomorphic(tensors=["tenth"]),
        "secure_32": lambda: secure_sum(SecureSettings(), SECRET, BOUND, lambda number: like, weighted=False),
    }


def main(
    silos: Annotated[int, typer.Option(help="Silos in the sum.")] = 4,
    values: Annotated[
        str, typer.Option(help="Values of an update, with commas between sizes.")
    ] = "10000,100000,1000000",
) -> None:
    """Measure and keep the figures."""
    result: dict[str, Any] = {
        "silos": silos,
        "step_32": grid(32, BOUND, silos).step,
        "step_16": grid(16, BOUND, silos).step,
    }
    for size in (int(each) for each in values.split(",")):
        like: Tensors = {
            "tenth": torch.empty(size // 10, device="meta"),
            "rest": torch.empty(size - size // 10, device="meta"),
        }
        found: dict[str, Any] = {"plain_server_s": round(plain(like, silos), 4)}
        for name, made in ways(like).items():
            cost = cost_of(made(), like, silos)
            found[name] = {key: float(f"{value:.4g}") for key, value in cost._asdict().items()}
            print(size, name, found[name], flush=True)
        result[str(size)] = found
    keep("homomorphic", result)


if __name__ == "__main__":
    typer.run(main)
