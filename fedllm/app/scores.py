"""Score a run's model on multiple-choice and exact-match files, before and after."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedllm.app.build import Parts
from fedllm.app.config import Recipe
from fedllm.silo.sources import read_rows, require_columns


def check_files(recipe: Recipe) -> None:
    """Refuse files that cannot be scored before anything is trained."""
    from fedllm.evaluation.choice import check

    wanted, root = recipe.evaluate, Path(recipe.data.root)
    for file in wanted.choice.values():
        for number, row in enumerate(read_rows(root / file)[: wanted.limit], 1):
            check(row, f"{root / file}, row {number}")
    for file in wanted.exact.values():
        require_columns(read_rows(root / file)[: wanted.limit], ("prompt", "answer"), str(root / file))


def score_files(parts: Parts, tick: Callable[[int], None], base: bool = False) -> dict[str, Any]:
    """Return the score of each file that the recipe names; `base` is the model as it was before training."""
    from fedllm.evaluation.choice import multiple_choice
    from fedllm.evaluation.exact import exact_match

    wanted, root = parts.recipe.evaluate, Path(parts.recipe.data.root)
    scores: dict[str, Any] = {}
    with parts.trainable.base(parts.model) if base else nullcontext():
        for name, file in wanted.choice.items():
            rows = read_rows(root / file)[: wanted.limit]
            found = multiple_choice(parts.model, parts.tokenizer, rows, parts.objective, where=file, tick=tick)
            scores[name] = found._asdict()
        for name, file in wanted.exact.items():
            rows = read_rows(root / file)[: wanted.limit]
            scores[name] = exact_match(parts.model, parts.tokenizer, rows, where=file, tick=tick)._asdict()
    return scores
