"""One of several processes that train one silo's model together: it holds its shards and does what is asked of all.

Told one JSON line a request on its input; answers with JSON lines: the tokens of every step (the first process), then
`done`. It ends when its input does, or with the error that its log then has.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def main(folder: Path, rank: int, count: int) -> None:
    """Work as process `rank` of `count` until the input ends."""
    # Whatever a library prints goes to the log; the answers have the real output to themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    import torch

    from fedllm.app.build import attached
    from fedllm.app.catalog import make
    from fedllm.app.config import read_recipe
    from fedllm.app.quiet import quiet_libraries
    from fedllm.silo.models import load_tokenizer
    from fedllm.silo.objective import causal_loss
    from fedllm.silo.sharded import shard

    quiet_libraries()
    told = json.loads((folder / "run.json").read_text(encoding="utf-8"))
    recipe, dtype = read_recipe(told["recipe"]), getattr(torch, told["dtype"])
    device = torch.device(told["device"], rank) if told["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    torch.set_num_threads(told["threads"])
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    torch.distributed.init_process_group(backend, init_method=f"file://{folder}/store", rank=rank, world_size=count)
    trainable = make("trainable", recipe.trainable, tokenizer=load_tokenizer(recipe.model))
    # Whole in main memory first; the device only ever has the shards.
    model = shard(attached(recipe, trainable, torch.device("cpu"), dtype), device, count)
    objective = causal_loss(None if trainable.adapter or dtype == torch.float32 else dtype)

    def say(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    for line in sys.stdin:
        asked = json.loads(line)
        work = make("client", asked["client"], objective, asked["pad_id"], rounds=asked["rounds"])
        answer(asked, folder, model, work, rank, say)
        say({"done": True})
    torch.distributed.destroy_process_group()


def answer(asked: Mapping[str, Any], folder: Path, model: Any, work: Any, rank: int, say: Any) -> None:
    """Train one round with the others; the first process writes the reply and what the silo remembers."""
    from fedllm.core.types import Request, Silo
    from fedllm.runtime.spool import load_message, save_message
    from fedllm.runtime.wire import reply_head
    from fedllm.silo.read_ahead import Ahead

    request = Request(asked["name"], asked["round"], "train", load_message(folder / "params")[0], asked["scalars"])
    rows = Ahead(load_message(folder / "rows")[0], asked["count"])
    memory = load_message(folder / "memory")[0]

    def tick(tokens: int) -> None:
        if rank == 0:
            say({"tokens": tokens})

    silo = Silo(asked["name"], model, {"train": rows, "test": []}, memory, asked["seed"], tick)
    reply, kept = work.client(request, silo)
    if rank == 0:
        save_message(folder / "reply", reply.tensors, reply_head(reply))
        save_message(folder / "kept", kept, {})


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
