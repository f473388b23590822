"""What the server of a full-weights DiLoCo run holds at most, in float32 models, over 2, 8 and 32 silos.

Each count runs in a process of its own. Two rounds of a model of 20 M values in 40 tensors, whose replies are files as
those of sites are, with Nesterov's momentum and a checkpoint after each; counted is what comes on top of Python and
torch, after two rounds of a tiny model. Replies stay in their files and are summed by parts of tensors,
as those of large models, or are read and added as they come, as small ones are; also where only a quarter of the model
has its turn in a round, as a fragment, and for 88 M values in 40 tensors.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.common import keep
from fedllm.core.aggregate import mean
from fedllm.core.optimisers import nesterov
from fedllm.core.room import room_for
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Request, State, Work
from fedllm.exchange.fragments import fragments
from fedllm.federation.server.serve import GIVEN_BACK
from fedllm.runtime.spool import load_message, open_message, save_message
from fedllm.runtime.store import Checkpoint, save_checkpoint

VALUES, TENSORS = 20_000_000, 40
LARGE = 88_000_000
COUNTS = (2, 8, 32)
FRAGMENTS = 4


def peak() -> float:
    """Return the most memory that this process has had so far, in bytes."""
    told = Path("/proc/self/status")
    if told.exists():
        # Elsewhere it may begin with what the parent had.
        return 1024 * int(told.read_text().split("VmHWM:")[1].split()[0])
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1024 if sys.platform != "darwin" else 1)


def now() -> float:
    """Return the memory that this process has, in bytes; where the system does not say, the most that it has had."""
    told = Path("/proc/self/statm")
    return int(told.read_text().split()[1]) * resource.getpagesize() if told.exists() else peak()


def shapes(values: int, part: int = 0, parts: int = 1) -> dict[str, int]:
    """Return the number of values of each tensor of a part of a model."""
    return {f"layer.{i}.x": values // TENSORS for i in range(TENSORS) if i % parts == part}


def file_of(place: Path, values: int, part: int, parts: int) -> Path:
    """Return where the reply with a part of a model lies."""
    return place / f"{values}-{part}-of-{parts}"


def rounds(place: Path, values: int, count: int, how: str) -> None:
    """Run two rounds with so many silos and print the peak in bytes, of the rounds and with the checkpoints.

    Replies stay in their `files` or come in `memory`; or they are files of `fragments`.
    """
    names, parts = [f"silo_{number}" for number in range(count)], FRAGMENTS if how == "fragments" else 1
    algorithm = averaging(
        work=Work(lambda request, silo: (Reply("", 0, {}, 1.0), {})),
        select=lambda number: names,
        aggregate=mean(),
        optimiser=nesterov(),
        share=fragments(FRAGMENTS) if how == "fragments" else None,
    )

    def two(values: int) -> State:
        def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
            read = load_message if how == "memory" else open_message
            for request in requests:
                path = file_of(place, values, request.round % parts, parts)
                yield Reply(request.client, request.round, read(path)[0], 1.0)

        kinds = {name: torch.empty(size, device="meta") for name, size in shapes(values).items()}
        state = algorithm.init({name: room_for(kind, "cpu").zero_() for name, kind in kinds.items()})
        for _ in range(2):
            state, _ = algorithm.server(state, exchange)
        return state

    # What torch loads of itself when it is first used is of no model.
    save_checkpoint(place, Checkpoint(two(TENSORS), {}))
    before = now()
    state = two(values)
    computed = peak() - before
    for _ in range(2):
        save_checkpoint(place, Checkpoint(state, {}))
    print(computed, peak() - before)


def child(place: Path, count: int, how: str, values: int = VALUES, env: Mapping[str, str] = GIVEN_BACK) -> list[float]:
    """Return what `rounds` prints in a process of its own, in float32 models."""
    command = [sys.executable, "-m", "benchmarks.server_memory", str(place), str(values), str(count), how]
    env = {**os.environ, **env}
    said = subprocess.run(command, check=True, capture_output=True, text=True, env=env).stdout.split()[-2:]
    return [round(float(each) / (4 * values), 2) for each in said]


def main() -> None:
    """Measure every count, print and keep what came out."""
    if len(sys.argv) == 5:
        rounds(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), sys.argv[4])
        return
    with TemporaryDirectory() as apart:
        place = Path(apart)
        for values, parts in (*product((TENSORS, VALUES), (1, FRAGMENTS)), (LARGE, 1)):
            for part in range(parts):
                sent = {name: torch.full((size,), 1e-3) for name, size in shapes(values, part, parts).items()}
                save_message(file_of(place, values, part, parts), sent, {})
        found = {(count, how): child(place, count, how) for count in COUNTS for how in ("files", "memory")}
        found[COUNTS[-1], "fragments"] = child(place, COUNTS[-1], "fragments")
        large = child(place, COUNTS[1], "files", LARGE)
        usual = child(place, COUNTS[0], "files", env={})
    for (count, how), (computed, stored) in found.items():
        print(f"{count} silos, {how}: {computed} models in the rounds, {stored} with the checkpoints")
    print(f"{COUNTS[1]} silos, files, {LARGE / 1e6:.0f} M values: {large[1]} models")
    print(f"{COUNTS[0]} silos, files: {usual[1]} models where the C library keeps what is free")
    result = {f"models_{count}": found[count, "files"][1] for count in COUNTS}
    result |= {f"models_{count}_in_memory": found[count, "memory"][1] for count in COUNTS}
    result |= {"models_fragments": found[COUNTS[-1], "fragments"][1], "models_8_large_tensors": large[1]}
    keep("server_memory", {**result, "models_usual_malloc": usual[1]})


if __name__ == "__main__":
    main()
