"""Per-example clipping for DP-SGD on LoRA beside opacus: the same model, the same records, in turn in one run.

`python -m benchmarks.dpsgd` needs `pip install --no-deps opacus==1.6.0 opt-einsum`, which is no dependency of fedllm
and leaves torch as it is. Measured is what a step takes from its records to the sum of their clipped gradients, in
tokens a second without padding. Opacus computes the records as it was given them, padded to the longest, some at a
time as its BatchMemoryManager would, by gradients of each record or by ghost clipping, whichever is fastest;
its loss is ours, which makes no logits before the first scored token. The goal is 1.5x, as the mean over steps of 32
records, the usual batch, of nine medical sources; beside it stand SmolLM2, and records that are all of one length.
"""

from __future__ import annotations

import argparse
import gzip
import json
import statistics
import time
import warnings
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks.common import RESULTS, keep, llama, texts, with_lora
from fedllm.core.seeds import derive
from fedllm.silo.dp_sgd import Room, clipped_gradients
from fedllm.silo.examples import Example, collate
from fedllm.silo.models import load_model, load_tokenizer
from fedllm.silo.objective import causal_loss
from fedllm.silo.tasks import instruct
from fedllm.silo.trainables import trained
from fedllm.silo.width import pass_tokens

MODEL = "smollm2-135m-instruct"
CLIP = 0.1
PHYSICAL = {"small": (8, 4), "large": (4, 2)}
"""Records that opacus is given at a time; more of them were slower, and of the large model do not fit into 24 GB."""
SOURCES = ("cancergov", "cdc", "gard", "ghr", "mplus", "nhlbi", "niddk", "ninds", "seniorhealth")
LARGE, SOME = ("cdc",), 8
"""Sources of which some records also go through SmolLM2: the one whose texts are of middle length."""
SMALL = (4, 256, 4096)
EQUAL = {"4 layers x 256, 16 x 16": (4, 256, 16, 16), "4 layers x 256, 32 x 64": (4, 256, 32, 64)}
"""Layers, width, and rows x tokens, all of them scored."""

CPU = torch.device("cpu")
Sum = dict[str, Tensor]


class Way(NamedTuple):
    """One way to a sum of clipped gradients."""

    name: str
    total: Callable[[Sequence[Example]], Sum]


def ours(model: nn.Module, pad: int, stack: ExitStack, room: Room | None = None) -> Way:
    room = room or Room(tokens=pass_tokens(model, CPU))
    model.train()
    return Way("fedllm", clipped_gradients(model, trained(model), causal_loss(), pad, CLIP, room, stack))


def by_opacus(model: nn.Module, pad: int, ghost: bool, physical: int | None) -> Way:
    """Opacus as its documentation has it, without noise."""
    from opacus.grad_sample import GradSampleModule, GradSampleModuleFastGradientClipping
    from opacus.optimizers import DPOptimizer, DPOptimizerFastGradientClipping
    from opacus.utils.fast_gradient_clipping_utils import DPTensorFastGradientClipping

    names, objective = list(trained(model)), causal_loss()
    common: dict[str, Any] = {"loss_reduction": "sum"}
    wrapped: Any = (
        GradSampleModuleFastGradientClipping(model, max_grad_norm=CLIP, **common)
        if ghost
        else GradSampleModule(model, **common)
    )
    wrapped.train()
    params = [value for value in wrapped.parameters() if value.requires_grad]
    kind: Any = DPOptimizerFastGradientClipping if ghost else DPOptimizer
    optimizer = kind(torch.optim.SGD(params), noise_multiplier=0.0, max_grad_norm=CLIP, expected_batch_size=1, **common)

    def total(rows: Sequence[Example]) -> Sum:
        size = physical or len(rows)
        optimizer._is_last_step_skipped = False
        optimizer.zero_grad(set_to_none=True)
        for first in range(0, len(rows), size):
            # As between the parts of a batch: what was summed stays, what was of single records goes.
            optimizer._is_last_step_skipped = first > 0
            optimizer.zero_grad(set_to_none=True)
            batch = collate(rows[first : first + size], pad, CPU)
            loss_B = objective(wrapped, batch) / batch.tokens_B
            if ghost:
                DPTensorFastGradientClipping(wrapped, optimizer, loss_B, "sum").backward()
                optimizer.accumulate()
            else:
                loss_B.sum().backward()
                optimizer.clip_and_accumulate()
        return {name: value.summed_grad.clone() for name, value in zip(names, params, strict=True)}

    return Way(f"opacus, {'ghost' if ghost else 'each'}, {physical or 'all'} at once", total)


def beside(
    fresh: Callable[[], nn.Module], rows: Sequence[Example], pad: int, times: int, sizes: Sequence[int | None]
) -> dict[str, Any]:
    """Time ours and the fastest way of opacus in turn, and compare what they say."""
    tokens = sum(len(row.input_ids) for row in rows)
    with ExitStack() as stack:
        mine, single = ours(fresh(), pad, stack), ours(fresh(), pad, stack, Room(1))
        ways = [by_opacus(fresh(), pad, ghost=False, physical=size) for size in sizes]
        ways.append(by_opacus(fresh(), pad, ghost=True, physical=sizes[-1]))
        fastest = min(ways, key=lambda way: seconds(way, rows))
        whole, alone, other = (way.total(rows) for way in (mine, single, fastest))
        pairs = [(seconds(mine, rows), seconds(fastest, rows)) for _ in range(times)]
    return {
        "tokens_over_opacus": round(statistics.median(b / a for a, b in pairs), 3),
        "fedllm_tokens_s": round(tokens / statistics.median(a for a, _ in pairs), 1),
        "opacus_tokens_s": round(tokens / statistics.median(b for _, b in pairs), 1),
        "opacus": fastest.name.removeprefix("opacus, "),
        "tokens": tokens,
        "records": len(rows),
        "error_one_by_one": apart(whole, alone),
        "error_opacus": apart(whole, other),
    }


def seconds(way: Way, rows: Sequence[Example]) -> float:
    begun = time.perf_counter()
    way.total(rows)
    return time.perf_counter() - begun


def apart(one: Sum, other: Sum) -> float:
    """Return how far two sums are apart, over the norm of the second."""
    a, b = (torch.cat([each[name].double().flatten() for name in one]) for each in (one, other))
    return float((a - b).norm() / b.norm())


def small(layers: int, hidden: int, vocab: int) -> nn.Module:
    return with_lora(llama(layers, hidden, vocab))[0]


def smollm2() -> nn.Module:
    return with_lora(load_model(MODEL, CPU, torch.float32, 512))[0]


def drawn(data: Path, tokenizer: Any, records: int) -> dict[str, list[Example]]:
    """Return one step's records of each source, drawn by chance, in the order in which they were drawn."""
    found = {}
    for source in SOURCES:
        with gzip.open(data / "medquad" / f"{source}.train.jsonl.gz", "rt", encoding="utf-8") as file:
            rows = [json.loads(line) for line in file]
        draw = torch.Generator().manual_seed(derive(0, source))
        some = [rows[place] for place in torch.randperm(len(rows), generator=draw)[:records].tolist()]
        found[source] = list(instruct(tokenizer).prepare(some, source).examples)
    return found


def in_vocabulary(rows: Sequence[Example]) -> list[Example]:
    """Return rows of the same lengths for a model that knows fewer tokens."""
    return [Example(*([token if token < 0 else token % SMALL[2] for token in ids] for ids in row)) for row in rows]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, default=RESULTS.parents[2] / "shared" / "data")
    parser.add_argument("--times", type=int, default=3, help="pairs that are timed")
    parser.add_argument("--records", type=int, default=32, help="of each source in a step")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    asked = parser.parse_args()
    torch.set_num_threads(asked.threads)
    warnings.filterwarnings("ignore", message="Full backward hook")
    tokenizer = load_tokenizer(MODEL)
    steps = drawn(asked.data, tokenizer, asked.records)
    found = {}

    def told(name: str, row: dict[str, Any]) -> None:
        found[name] = row
        print(
            f"{name:<28}{row['fedllm_tokens_s']:>9,.0f}{row['opacus_tokens_s']:>9,.0f} tokens/s"
            f"{row['tokens_over_opacus']:>7.2f}x   opacus: {row['opacus']}, apart {row['error_opacus']:.1e}, "
            f"one by one {row['error_one_by_one']:.1e}",
            flush=True,
        )

    for name, (layers, hidden, rows, tokens) in EQUAL.items():
        batch = texts(rows, tokens, SMALL[2], "dpsgd")["train"]
        told(name, beside(partial(small, layers, hidden, SMALL[2]), batch, 0, asked.times, PHYSICAL["small"]))
    for source, records in steps.items():
        told(
            f"small, {source}",
            beside(partial(small, *SMALL), in_vocabulary(records), 0, asked.times, PHYSICAL["small"]),
        )
    for source in LARGE:
        told(
            f"SmolLM2, {source}",
            beside(smollm2, steps[source][:SOME], tokenizer.pad_token_id, asked.times, PHYSICAL["large"]),
        )
    ratios, large = (
        [row["tokens_over_opacus"] for name, row in found.items() if name.startswith(kind)]
        for kind in ("small", "SmolLM2")
    )
    keep(
        "dpsgd",
        {
            "tokens_over_opacus": round(statistics.geometric_mean(ratios), 3),
            "tokens_over_opacus_least": min(ratios),
            "tokens_over_opacus_smollm2": round(statistics.geometric_mean(large), 3),
            "tokens_over_opacus_equal_lengths": min(found[name]["tokens_over_opacus"] for name in EQUAL),
            "error_one_by_one": max(row["error_one_by_one"] for row in found.values()),
            "error_opacus": max(row["error_opacus"] for row in found.values()),
            "cases": found,
        },
    )


if __name__ == "__main__":
    main()
