"""Secure aggregation: is the sum right, what does it cost a silo in CPU and bytes, and how does Flower's compare.

Ten silos with 10 M values each, 8 neighbours, three of them lost after they shared their keys. With the Python of a
virtual environment that has `flwr[simulation]`, Flower's SecAgg+ does the same beside it, on the same values:

    FLOWER=VENV/bin/python python -m benchmarks.secagg
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import typer

from benchmarks.common import keep, summing_silos
from fedllm.core.types import Reply, Request, Tensors
from fedllm.exchange.secure.fixed_point import grid
from fedllm.exchange.secure.middleware import secure_sum
from fedllm.exchange.secure.settings import Settings, circle
from fedllm.runtime.wire import message_bytes, reply_head

SILOS, VALUES, LOST, NEIGHBOURS = 10, 10_000_000, 3, 8
BOUND = 1.0


class Cost(NamedTuple):
    """What one round came to."""

    error: float
    """Largest difference of the mean that the server is told from the plain one: of the sum it is as often that."""
    step: float
    cpu: float
    """Seconds of a silo, without its training: the largest of all."""
    ratio: float
    """Bytes that a silo and the server send each other for it, over those of the update as float32."""
    seconds: float
    """Of the whole round, silos one after another."""


def update_of(place: int, values: int) -> dict[str, torch.Tensor]:
    """Return an update of norm 1 at most, of which every value counts."""
    drawn = torch.from_numpy(np.random.default_rng(place).standard_normal(values, dtype=np.float32))
    return {"update": drawn.mul_(0.99 * BOUND / float(drawn.norm()))}


def ours(bits: int, values: int, lost: int) -> Cost:
    """Do one round and measure it."""
    like: Tensors = {"update": torch.empty(values, device="meta")}
    settings = Settings(neighbours=NEIGHBOURS, drop_outs=LOST, bits=bits)  # type: ignore[arg-type]
    names = [f"silo_{place}" for place in range(SILOS)]
    updates = {name: update_of(place, values) for place, name in enumerate(names)}
    layer = secure_sum(settings, b"s" * 32, BOUND, lambda number: like, weighted=False)
    everyone, spent, sent = summing_silos(layer, updates)

    def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
        gone = names[:lost]
        return everyone(
            [each for each in requests if each.op not in ("train", "secure_sum") or each.client not in gone]
        )

    begun = time.perf_counter()
    # The weights that go down are as many bytes with or without: they are left out.
    (reply,) = layer.exchange(exchange)([Request(name, 0, "train", {}) for name in names])
    seconds = time.perf_counter() - begun
    assert list(reply.of) == names[lost:], reply.lost
    plain = sum((updates[name]["update"].double() for name in names[lost:]), torch.zeros(values, dtype=torch.float64))
    error = float((reply.tensors["update"].double() - plain / len(reply.of)).abs().max())
    now = circle(settings, SILOS, SILOS)
    bare = message_bytes(updates[names[0]], reply_head(Reply(names[0], 0, {}, 1.0)))
    step = grid(bits, BOUND, now.silos).step
    return Cost(error, step, max(spent.values()), max(sent.values()) / bare, seconds)


def plain_seconds(values: int) -> float:
    """Return how long the plain sum of the same updates takes here."""
    updates = [update_of(place, values)["update"] for place in range(SILOS)]
    begun = time.perf_counter()
    total = torch.zeros(values, dtype=torch.float64)
    for update in updates:
        total += update
    return time.perf_counter() - begun


FLOWER = """
import json, os, sys, time
import numpy as np
from flwr.client import ClientApp, NumPyClient
from flwr.client.mod import secaggplus_mod
from flwr.common import Context, ndarrays_to_parameters
from flwr.server import LegacyContext, ServerApp, ServerConfig
from flwr.server.strategy import FedAvg
from flwr.server.workflow import DefaultWorkflow, SecAggPlusWorkflow
from flwr.simulation import run_simulation

SILOS, VALUES, NEIGHBOURS, ROUNDS, SECURE, OUT = json.loads(sys.argv[1])

class Client(NumPyClient):
    def fit(self, parameters, config):
        return [np.zeros(VALUES, np.float32) + 1e-3], 1, {}

stamps = []

class Timed(FedAvg):
    def configure_fit(self, *given, **more):
        stamps.append(time.perf_counter())
        return super().configure_fit(*given, **more)
    def aggregate_fit(self, *given, **more):
        found = super().aggregate_fit(*given, **more)
        stamps.append(time.perf_counter())
        return found

client = ClientApp(client_fn=lambda context: Client().to_client(), mods=[secaggplus_mod] if SECURE else [])
server = ServerApp()

@server.main()
def main(grid, context: Context) -> None:
    strategy = Timed(
        fraction_fit=1.0, fraction_evaluate=0.0, min_fit_clients=SILOS, min_available_clients=SILOS,
        initial_parameters=ndarrays_to_parameters([np.zeros(VALUES, np.float32)]),
    )
    legacy = LegacyContext(context=context, config=ServerConfig(num_rounds=ROUNDS), strategy=strategy)
    fit = SecAggPlusWorkflow(num_shares=NEIGHBOURS + 1, reconstruction_threshold=5) if SECURE else None
    DefaultWorkflow(fit_workflow=fit)(grid, legacy)
    pairs = list(zip(stamps[::2], stamps[1::2]))
    with open(OUT, "w") as file:
        json.dump([b - a for a, b in pairs], file)

run_simulation(server_app=server, client_app=client, num_supernodes=SILOS,
               backend_config={"client_resources": {"num_cpus": 1, "num_gpus": 0.0}})
"""


def flower(python: Path, values: int, rounds: int, secure: bool) -> list[float]:
    """Return the seconds of each of Flower's rounds in simulation, from choosing the silos to having the mean."""
    with tempfile.TemporaryDirectory(prefix="fedllm-flower-") as place:
        told, program = Path(place) / "told.json", Path(place) / "flower_secagg.py"
        program.write_text(FLOWER)
        asked = json.dumps([SILOS, values, NEIGHBOURS, rounds, secure, str(told)])
        env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
        env |= {"FLWR_TELEMETRY_ENABLED": "0", "RAY_DEDUP_LOGS": "0", "FLWR_HOME": place}
        done = subprocess.run([python, program, asked], env=env, cwd=place, capture_output=True, text=True)
        if not told.exists():
            print(done.stderr[-3000:], file=sys.stderr)
            raise RuntimeError("Flower did not end its rounds; the end of what it said is above")
        return list(json.loads(told.read_text()))


def main(
    flower_python: Annotated[
        Path | None,
        typer.Option("--flower", envvar="FLOWER", help="Python of an environment with flwr[simulation]."),
    ] = None,
    values: Annotated[int, typer.Option(help="Values of an update.")] = VALUES,
    times: Annotated[int, typer.Option(help="Rounds that are timed; the best is told.")] = 3,
) -> None:
    """Measure, and keep what came out."""
    torch.set_num_threads(1)
    whole = [ours(32, values, LOST) for _ in range(times)]
    packed = [ours(16, values, LOST) for _ in range(times)]
    found: dict[str, Any] = {
        "silos": SILOS,
        "values": values,
        "lost": LOST,
        "neighbours": NEIGHBOURS,
        "max_abs_error": max(each.error for each in whole),
        "quantisation_step": whole[0].step,
        "max_abs_error_16": max(each.error for each in packed),
        "quantisation_step_16": packed[0].step,
        "client_cpu_s": round(min(each.cpu for each in whole), 3),
        "client_cpu_s_16": round(min(each.cpu for each in packed), 3),
        "bytes_ratio": round(whole[0].ratio, 4),
        "bytes_ratio_16": round(packed[0].ratio, 4),
        "round_s": None,
        "plain_s": round(min(plain_seconds(values) for _ in range(times)), 3),
        "flower_round_s": None,
        "flower_plain_s": None,
        "flower_over_ours": None,
    }
    seconds = [ours(32, values, 0).seconds for _ in range(times)]
    found["round_s"] = round(min(seconds), 3)
    if flower_python is None:
        print("Flower was not measured: give --flower the Python of an environment with flwr[simulation].")
    else:
        theirs = flower(flower_python, values, times, True)
        bare = flower(flower_python, values, times, False)
        found |= {"flower_round_s": round(min(theirs), 3), "flower_plain_s": round(min(bare), 3)}
        found["flower_over_ours"] = round(min(theirs) / min(seconds), 2)
    keep("secagg", found)


if __name__ == "__main__":
    typer.run(main)
