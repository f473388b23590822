"""What the benchmarks share: a stated machine, paired timing, and a result that is kept."""

from __future__ import annotations

import json
import platform
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

import fedllm
from fedllm.app.config import Recipe
from fedllm.core.seeds import derive, generator
from fedllm.core.types import Dataset, Exchange, Middleware, Reply, Request, Silo, Tensors
from fedllm.runtime.store import read_events
from fedllm.runtime.wire import message_bytes, reply_head, request_head
from fedllm.silo.examples import Example
from fedllm.silo.trainables import lora, parameters, trained

RESULTS = Path(__file__).parent / "results"


def machine() -> str:
    """Describe the machine in one line."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        cpu = next((line.split(":")[1].strip() for line in info.read_text().splitlines() if "model name" in line), cpu)
    gpu = f", {torch.cuda.get_device_name()}" if torch.cuda.is_available() else ""
    return f"{torch.get_num_threads()} threads of {cpu}{gpu}, torch {torch.__version__}, {platform.system()}"


def paired(first: Callable[[], Any], second: Callable[[], Any], times: int) -> tuple[float, float, float]:
    """Time two functions in turn; return the median seconds of each and the median of the ratios second / first."""
    seconds: list[tuple[float, float]] = []
    first(), second()
    for _ in range(times):
        pair = []
        for function in (first, second):
            begun = time.perf_counter()
            function()
            pair.append(time.perf_counter() - begun)
        seconds.append((pair[0], pair[1]))
    return (
        statistics.median(a for a, _ in seconds),
        statistics.median(b for _, b in seconds),
        statistics.median(b / a for a, b in seconds),
    )


def llama(layers: int = 4, hidden: int = 256, vocab: int = 4096) -> LlamaForCausalLM:
    """Return a seeded Llama of that size, frozen."""
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=hidden * 8 // 3 // 8 * 8,
        num_hidden_layers=layers,
        num_attention_heads=hidden // 64 if hidden >= 128 else 2,
        num_key_value_heads=hidden // 64 if hidden >= 128 else 2,
        max_position_embeddings=1024,
        tie_word_embeddings=True,
    )
    return LlamaForCausalLM(config).requires_grad_(False).eval()


def texts(count: int, tokens: int, vocab: int, name: str) -> Dataset:
    """Return examples of exactly `tokens` random tokens, all scored."""
    draws = torch.randint(3, vocab, (count, tokens), generator=generator(0, "texts", name)).tolist()
    return {"train": [Example(row, row) for row in draws], "test": []}


def members(model: torch.nn.Module, params: Tensors, data: Mapping[str, Dataset]) -> list[tuple[Request, Silo]]:
    """Return a round's requests and silos."""
    return [
        (Request(name, 0, "train", params), Silo(name, model, each, {}, derive(0, name))) for name, each in data.items()
    ]


def with_lora(model: torch.nn.Module) -> tuple[torch.nn.Module, Tensors]:
    """Attach LoRA of rank 8 and return the model and its parameters; B is not zero, so that all of it is at work."""
    attached = lora(r=8).attach(model, 0)
    with torch.no_grad():
        for name, value in trained(attached).items():
            if ".lora_B." in name:
                value.copy_(torch.randn(value.shape, generator=generator(0, name)) * 0.02)
    return attached, parameters(attached)


def summing_silos(
    layer: Middleware, updates: Mapping[str, Tensors]
) -> tuple[Exchange, dict[str, float], dict[str, int]]:
    """Return an exchange with silos that send these updates through a layer, and each one's CPU seconds and bytes."""
    assert layer.client is not None
    client = layer.client(lambda request, silo: (Reply(request.client, 0, updates[request.client], 1.0), {}))
    spent, sent, memory = dict.fromkeys(updates, 0.0), dict.fromkeys(updates, 0), dict[str, Tensors]()

    def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
        for request in requests:
            silo = Silo(request.client, torch.nn.Identity(), {}, memory.get(request.client, {}), 0)
            begun = time.process_time()
            reply, memory[request.client] = client(request, silo)
            spent[request.client] += time.process_time() - begun
            sent[request.client] += message_bytes(request.tensors, request_head(request))
            sent[request.client] += message_bytes(reply.tensors, reply_head(reply))
            yield reply

    return exchange, spent, sent


def keep(name: str, result: Mapping[str, Any]) -> None:
    """Print the result as the last line, and keep it with the command and the machine."""
    RESULTS.mkdir(exist_ok=True)
    command = f"python -m benchmarks.{name} {' '.join(sys.argv[1:])}".strip()
    written = {"command": command, "machine": machine(), **result}
    (RESULTS / f"{name}.json").write_text(json.dumps(written, indent=1) + "\n")
    print(json.dumps(result))


def kept(name: str) -> dict[str, Any]:
    """Return what is kept of a benchmark, if it was measured on such a machine as this one."""
    path = RESULTS / f"{name}.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    own = before.pop("machine", "") == machine()
    return {key: value for key, value in before.items() if own and key != "command"}


def done(recipe: Recipe | Mapping[str, Any], folder: Path) -> Path:
    """Run a recipe in a folder, or go on with the run that is there."""
    if not (folder / "recipe.toml").is_file():
        fedllm.run(recipe, folder)
    elif "done" not in {event["event"] for event in read_events(folder)}:
        fedllm.resume(folder)
    return folder
