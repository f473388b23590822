"""Tokens a second inside a federated run over a bare PyTorch loop with the same model, batches and steps.

The federated side is all that a round does on one machine: requests, counted bytes, local training,
checks of the replies, aggregation with its probe, the server's step, and a checkpoint on disk.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import torch

from benchmarks.common import keep, llama, paired, texts, with_lora
from fedllm.core.aggregate import mean
from fedllm.core.round import averaging
from fedllm.core.seeds import derive
from fedllm.core.types import Silo
from fedllm.exchange.lora_error import lora_error
from fedllm.exchange.select import everyone
from fedllm.runtime.local import local
from fedllm.runtime.meter import Traffic, metered
from fedllm.runtime.store import Checkpoint, save_checkpoint
from fedllm.silo.examples import collate, draws
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import trained, write
from fedllm.silo.training import local_training

SILOS, STEPS, ROWS, TOKENS, VOCAB = 3, 4, 4, 128, 4096


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    model, params = with_lora(llama(6, 384, VOCAB))
    names = [f"silo_{i}" for i in range(SILOS)]
    data = {name: texts(ROWS * STEPS, TOKENS, VOCAB, name) for name in names}
    seeds = {name: derive(0, name) for name in names}
    work = local_training(causal_loss(), 0, steps=STEPS, batch_size=ROWS, learning_rate=1e-3)
    algorithm = averaging(work=work, select=everyone(names), aggregate=mean(), probes=[lora_error()])
    folder = Path(tempfile.mkdtemp())

    def federated() -> None:
        exchange = local(algorithm.client, lambda name: Silo(name, model, data[name], {}, seeds[name]), {})
        state, _ = algorithm.server(algorithm.init(params), metered(exchange, Traffic()))
        save_checkpoint(folder, Checkpoint(state, {}))

    def bare() -> None:
        for name in names:
            write(trained(model), params)
            values = list(trained(model).values())
            optimiser = torch.optim.AdamW(values, 1e-3, weight_decay=0.0, fused=True)
            model.train()
            for rows in draws(data[name]["train"], ROWS, 0, STEPS, derive(seeds[name], "order")):
                batch = collate(rows, 0, torch.device("cpu"))
                optimiser.zero_grad(set_to_none=True)
                loss = model(input_ids=batch.input_ids_BT, labels=batch.labels_BT, use_cache=False).loss
                loss.backward()
                torch.nn.utils.clip_grad_norm_(values, 1.0)
                optimiser.step()

    federated_s, bare_s, ratio = paired(federated, bare, times)
    tokens = SILOS * STEPS * ROWS * TOKENS
    print(f"federated {tokens / federated_s:,.0f} tokens/s, bare loop {tokens / bare_s:,.0f} tokens/s, n = {times}")
    keep(
        "overhead",
        {
            "federated_over_bare": round(ratio, 3),
            "federated_tokens_per_s": round(tokens / federated_s),
            "bare_tokens_per_s": round(tokens / bare_s),
        },
    )


if __name__ == "__main__":
    main()
