"""A round's clients as one batch against one by one: speed and equality, over sizes.

The goal is 1.5x at 16 clients x batch 2 x 64 tokens on two quiet CPU cores with a 4-layer, 256-wide
Llama, 3x at batch 1 x 16, and never slower than one by one: the width is the one that a run would choose.
"""

from __future__ import annotations

import sys

import torch

from benchmarks.common import keep, llama, members, paired, texts, with_lora
from fedllm.silo.objective import causal_loss
from fedllm.silo.training import local_training
from fedllm.silo.width import cohort_width

CLIENTS, STEPS, VOCAB = 16, 4, 4096

SIZES = {
    "2 layers x 128, 1 x 16": (2, 128, 1, 16),
    "4 layers x 256, 1 x 16": (4, 256, 1, 16),
    "4 layers x 256, 2 x 64": (4, 256, 2, 64),
    "4 layers x 256, 4 x 128": (4, 256, 4, 128),
    "4 layers x 768, 1 x 16": (4, 768, 1, 16),
    "4 layers x 768, 2 x 64": (4, 768, 2, 64),
}
"""Layers, width, and each client's rows x tokens."""


def measure(layers: int, hidden: int, rows: int, tokens: int, times: int) -> dict[str, float]:
    model, params = with_lora(llama(layers, hidden, VOCAB))
    data = {f"silo_{i:02d}": texts(rows * STEPS, tokens, VOCAB, f"{i}") for i in range(CLIENTS)}
    round_of = members(model, params, data)
    work = local_training(causal_loss(), 0, steps=STEPS, batch_size=rows, learning_rate=1e-3)
    assert work.cohort is not None
    width = cohort_width(model, rows, tokens, torch.device("cpu"))

    def one_by_one() -> list[dict[str, torch.Tensor]]:
        return [dict(work.client(*each)[0].tensors) for each in round_of]

    def as_cohort() -> list[dict[str, torch.Tensor]]:
        if width == 1:
            return one_by_one()
        groups = [round_of[start : start + width] for start in range(0, CLIENTS, width)]
        return [dict(reply.tensors) for group in groups for reply, _ in work.cohort(group)]

    error = difference(one_by_one(), as_cohort())
    batched, single, ratio = paired(as_cohort, one_by_one, times)
    return {
        "ratio": round(ratio, 3),
        "width": min(width, CLIENTS),
        "error": error,
        "single_s": single,
        "cohort_s": batched,
    }


def difference(ones: list[dict[str, torch.Tensor]], many: list[dict[str, torch.Tensor]]) -> float:
    return max(float((a[name] - b[name]).abs().max()) for a, b in zip(ones, many, strict=True) for name in a)


def sgd_difference() -> float:
    """Compare with plain SGD, which does not divide rounding by near-zero second moments as AdamW does."""
    model, params = with_lora(llama(4, 256, VOCAB))
    round_of = members(model, params, {f"silo_{i}": texts(2 * STEPS, 64, VOCAB, f"{i}") for i in range(8)})
    work = local_training(causal_loss(), 0, steps=STEPS, batch_size=2, learning_rate=0.1, optimiser="sgd")
    assert work.cohort is not None
    ones = [dict(work.client(*each)[0].tensors) for each in round_of]
    return difference(ones, [dict(reply.tensors) for reply, _ in work.cohort(round_of)])


def main() -> None:
    times = int(sys.argv[1]) if len(sys.argv) > 1 else 5
    print(f"{'size':<26}{'one by one':>12}{'cohort':>10}{'width':>7}{'faster':>8}{'max error':>12}")
    found = {}
    for name, size in SIZES.items():
        found[name] = row = measure(*size, times=times)
        print(
            f"{name:<26}{row['single_s']:>10.2f} s{row['cohort_s']:>8.2f} s{row['width']:>7.0f}"
            f"{row['ratio']:>7.2f}x{row['error']:>12.1e}"
        )
    keep(
        "cohort",
        {
            "cohort_over_sequential": found["4 layers x 256, 2 x 64"]["ratio"],
            "cohort_over_sequential_small": found["4 layers x 256, 1 x 16"]["ratio"],
            "max_abs_error": max(row["error"] for row in found.values()),
            "max_abs_error_sgd": sgd_difference(),
            "least": min(row["ratio"] for row in found.values()),
            "sizes": found,
        },
    )


if __name__ == "__main__":
    main()
