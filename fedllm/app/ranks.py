"""Several processes that train one silo's model together; for the rest of a run they are local training like any other.

What goes between this process and those are files in a folder of their own, and one JSON line for each; they keep no
state from one request to the next, so one that fails costs a round and no more.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fedllm.app.config import Recipe
from fedllm.core.errors import FedllmError
from fedllm.core.types import Reply, Request, Silo, Tensors, Work
from fedllm.federation import leash
from fedllm.runtime.spool import load_message, save_message
from fedllm.runtime.wire import reply_of
from fedllm.silo.fit import slowed
from fedllm.silo.read_ahead import rows_of

PATIENCE = 10.0
"""Seconds in which a process whose input has ended must be gone."""


class Ranks:
    """The processes of a run, started when first needed; closing ends them, and another use starts them again."""

    def __init__(self, recipe: Recipe, device: torch.device, dtype: torch.dtype) -> None:
        """Say what they train; nothing is started yet."""
        self._recipe, self._device, self._dtype = recipe, device, dtype
        self._folder: TemporaryDirectory[str] | None = None
        self._each: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Ranks:
        return self

    def __exit__(self, *problem: object) -> None:
        self.close()

    def close(self) -> None:
        """End the processes and forget what went between."""
        for each in self._each:
            if each.stdin:
                each.stdin.close()
        for each in self._each:
            try:
                each.wait(PATIENCE if self._idle else 0)
            except subprocess.TimeoutExpired:
                each.kill()
                each.wait()
            if each.stdout:
                each.stdout.close()
        self._each = []
        if self._folder:
            self._folder.cleanup()
            self._folder = None

    def work(self, whole: Work, table: Mapping[str, Any], pad_id: int) -> Work:
        """Return the local training of a recipe's [client] `table` as these processes do it."""
        head = {"client": dict(table), "pad_id": pad_id, "rounds": self._recipe.rounds}

        def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
            return self._train(request, silo, whole.steps(silo.data), head)

        return whole._replace(client=client, cohort=None)

    def _train(self, request: Request, silo: Silo, steps: int, head: Mapping[str, Any]) -> tuple[Reply, Tensors]:
        if not self._each:
            self._start()
        assert self._folder
        folder, size = Path(self._folder.name), int(head["client"].get("batch_size", 8))
        taken = slowed(steps, request.scalars.get("slow", 1.0))
        save_message(folder / "params", request.tensors, {})
        save_message(folder / "memory", silo.memory, {})
        save_message(folder / "rows", rows_of(silo.data["train"], size, request.round * steps, taken, silo.seed), {})
        told = {**head, "round": request.round, "scalars": dict(request.scalars), "name": silo.name, "seed": silo.seed}
        self._idle = False
        try:
            self._ask({**told, "count": len(silo.data["train"])}, silo)
        except BaseException:
            self.close()
            raise
        self._idle = True
        tensors, about = load_message(folder / "reply")
        kept, _ = load_message(folder / "kept")
        reply = reply_of(tensors, about)
        home = {name: value.to(request.tensors[name].device) for name, value in reply.tensors.items()}
        return reply._replace(tensors={name: home[name] for name in request.tensors}), kept

    def _ask(self, told: Mapping[str, Any], silo: Silo) -> None:
        """Let all processes do one round and hear of the steps; return when all are done."""
        line, halves = (json.dumps(told) + "\n").encode(), [b"" for _ in self._each]
        with selectors.DefaultSelector() as waiting:
            for rank, each in enumerate(self._each):
                assert each.stdin and each.stdout
                try:
                    each.stdin.write(line)
                    each.stdin.flush()
                except BrokenPipeError:
                    raise FedllmError(self._failed(rank)) from None
                waiting.register(each.stdout, selectors.EVENT_READ, rank)
            while waiting.get_map():
                for key, _ in waiting.select():
                    said = os.read(key.fd, 1 << 16)
                    if not said:
                        raise FedllmError(self._failed(key.data))
                    *lines, halves[key.data] = (halves[key.data] + said).split(b"\n")
                    for heard in map(json.loads, lines):
                        if "done" in heard:
                            waiting.unregister(key.fileobj)
                        else:
                            silo.tick(heard["tokens"])

    def _start(self) -> None:
        self._folder, self._idle = TemporaryDirectory(prefix="fedllm-ranks-"), True
        folder, count = Path(self._folder.name), self._recipe.processes
        told = {
            "recipe": self._recipe.model_dump(mode="json", exclude_none=True, exclude={"silos", "partition"}),
            "device": self._device.type,
            "dtype": str(self._dtype).removeprefix("torch."),
            "threads": max(1, torch.get_num_threads() // count),
        }
        (folder / "run.json").write_text(json.dumps(told), encoding="utf-8")
        # They speak to each other on this machine alone.
        loop = "lo0" if sys.platform == "darwin" else "lo"
        env = {**os.environ, "GLOO_SOCKET_IFNAME": loop, "NCCL_SOCKET_IFNAME": loop}
        leashed = [sys.executable, "-P", str(leash.__file__), str(os.getpid())]
        for rank in range(count):
            with (folder / f"log-{rank}").open("w", encoding="utf-8") as log:
                self._each.append(
                    subprocess.Popen(
                        [*leashed, sys.executable, "-m", "fedllm.app.rank", str(folder), str(rank), str(count)],
                        stdin=subprocess.PIPE,
                        stdout=subprocess.PIPE,
                        stderr=log,
                        env=env,
                        # Ctrl-C is for the run, which then ends them.
                        start_new_session=True,
                    )
                )

    def _failed(self, rank: int) -> str:
        """Say which process ended, and its last word."""
        assert self._folder
        words = Path(self._folder.name, f"log-{rank}").read_text(encoding="utf-8", errors="replace").split("\n")
        last = next((word.strip() for word in reversed(words) if word.strip()), "it said nothing").rstrip(".")
        # One that ended by itself names no signal.
        with suppress(subprocess.TimeoutExpired, ValueError):
            last = f"{signal.Signals(-self._each[rank].wait(1.0)).name}: {last}"
        return (
            f"Process {rank + 1} of the {len(self._each)} that train together has ended ({last:.300}); if memory ran "
            "out, lower client.micro_batch, else set processes = 1 to see the error; then resume."
        )


def check_processes(recipe: Recipe, device: torch.device) -> None:
    """Raise unless a recipe's `processes` can train together on this device."""
    count, rows = recipe.processes, int(recipe.client.get("batch_size", 8))
    if count == 1:
        return
    if not torch.distributed.is_available() or device.type not in ("cpu", "cuda"):
        raise FedllmError(
            f"processes is {count}, and torch trains with several only on CPUs and CUDA GPUs; set processes = 1."
        )
    if device.type == "cuda" and torch.cuda.device_count() < count:
        raise FedllmError(
            f"processes is {count} and this machine has {torch.cuda.device_count()} GPUs, of which each process needs "
            "one; lower processes, or set device = 'cpu'."
        )
    if recipe.runtime == "cohort":
        raise FedllmError(
            f"processes is {count} and runtime is 'cohort', which trains many silos in one process; keep one of them "
            "(runtime = 'local' or processes = 1)."
        )
    if rows < count:
        raise FedllmError(
            f"processes is {count} and client.batch_size {rows}, of which each process takes its rows; raise the batch "
            "or lower processes."
        )
