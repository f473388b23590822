"""The mean as a fold: peak memory over 10 and over 1,000 updates of 10 M values, and its speed.

Each count runs in a process of its own, so that its peak is its own. The baseline holds all updates
and averages them once; it is shown for 10 updates, where it still fits.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time

import torch

from benchmarks.common import keep
from fedllm.core.aggregate import mean

VALUES, TENSORS = 10_000_000, 40


def like() -> dict[str, torch.Tensor]:
    return {f"layer_{i}": torch.zeros(VALUES // TENSORS) for i in range(TENSORS)}


def fold(count: int) -> None:
    """Fold `count` updates and print the peak memory in MB and the seconds spent adding."""
    aggregate, update = mean(), like()
    total, seconds = aggregate.zero(update), 0.0
    for client in range(count):
        for value in update.values():
            value.fill_(1e-3 * (client + 1))
        begun = time.perf_counter()
        total = aggregate.add(total, update, float(client + 1))
        seconds += time.perf_counter() - begun
    aggregate.done(total)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, seconds)


def hold(count: int) -> None:
    """Hold `count` updates, average them at the end, and print the same."""
    updates = [{name: value + client for name, value in like().items()} for client in range(count)]
    begun = time.perf_counter()
    for name in updates[0]:
        torch.stack([update[name] for update in updates]).mean(0)
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024, time.perf_counter() - begun)


def child(what: str, count: int) -> tuple[float, float]:
    command = [sys.executable, "-m", "benchmarks.aggregate", what, str(count)]
    peak, seconds = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-2:]
    return float(peak), float(seconds)


def main() -> None:
    if len(sys.argv) == 3:
        {"fold": fold, "hold": hold}[sys.argv[1]](int(sys.argv[2]))
        return
    held, _ = child("hold", 10)
    ten, _ = child("fold", 10)
    thousand, seconds = child("fold", 1000)
    speed = 1000 * VALUES * 4 / seconds / 1e9
    print(f"peak: fold of 10 {ten:.0f} MB, fold of 1,000 {thousand:.0f} MB, holding 10 {held:.0f} MB")
    print(f"speed: {speed:.2f} GB/s of float32 updates, {seconds:.1f} ms an update of 10 M values")
    keep(
        "aggregate",
        {
            "peak_mb_10": round(ten),
            "peak_mb_1000": round(thousand),
            "gb_per_s": round(speed, 2),
            "peak_mb_holding_10": round(held),
        },
    )


if __name__ == "__main__":
    main()
