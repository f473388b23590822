"""Score a run's model on multiple-choice and exact-match files, before and after."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedllm.app.build import Parts
from fedllm.silo.sources import read_rows


def score_files(parts: Parts, base: bool = False) -> dict[str, Any]:
    """Return the score of each file that the recipe names; `base` is the model as it was before training."""
    from fedllm.evaluation.choice import multiple_choice
    from fedllm.evaluation.exact import exact_match

    wanted, root = parts.recipe.evaluate, Path(parts.recipe.data.root)
    scores: dict[str, Any] = {}
    with parts.trainable.base(parts.model) if base else nullcontext():
        for name, file in wanted.choice.items():
            rows = read_rows(root / file)[: wanted.limit]
            scores[name] = multiple_choice(parts.model, parts.tokenizer, rows, parts.objective)._asdict()
        for name, file in wanted.exact.items():
            rows = read_rows(root / file)[: wanted.limit]
            scores[name] = exact_match(parts.model, parts.tokenizer, rows)._asdict()
    return scores
