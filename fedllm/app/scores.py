"""Score a run's model on files that no silo holds, before and after: multiple choice, exact match, general text."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from fedllm.app.build import Parts
from fedllm.app.config import Recipe
from fedllm.core.errors import FedllmError
from fedllm.core.types import Request, Silo, Tensors
from fedllm.silo.evaluate import held_out
from fedllm.silo.examples import spread
from fedllm.silo.sources import read_rows, require_columns
from fedllm.silo.tasks import causal


def check_files(recipe: Recipe) -> None:
    """Refuse files that cannot be scored before anything is trained."""
    from fedllm.evaluation.choice import check

    wanted, root = recipe.evaluate, Path(recipe.data.root)
    for file in wanted.choice.values():
        for number, row in enumerate(read_rows(root / file)[: wanted.limit], 1):
            check(row, f"{root / file}, row {number}")
    for file in wanted.exact.values():
        require_columns(read_rows(root / file)[: wanted.limit], ("prompt", "answer"), str(root / file))
    for name, file in wanted.general.items():
        if not (root / file).exists():
            raise FedllmError(
                f"evaluate.general.{name}: there is no '{root / file}' on this machine, where it is scored; give "
                "a file of rows with 'text', or leave it out."
            )
        require_columns(read_rows(root / file), ("text",), str(root / file))


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


def general_losses(
    parts: Parts, params: Tensors, tick: Callable[[int], None], base: bool = False
) -> dict[str, dict[str, float]]:
    """Return as `general` the loss of these parameters on each general text, in nats a token.

    It is cut into blocks as long as the rows that were trained on, of which `evaluate.limit` are scored, spread evenly
    over the text. Texts of other tasks than plain text are scored so too: it is one measure before and after.
    """
    recipe, losses = parts.recipe, dict[str, float]()
    if not recipe.evaluate.general:
        return {}
    task = causal(parts.tokenizer, block=int(recipe.task.get("block", recipe.task.get("max_tokens", 256))))
    rows = recipe.evaluate.batch_size
    client = held_out(parts.objective, task, parts.tokenizer, parts.trainable, batch_size=rows, first=parts.own)
    for name, file in recipe.evaluate.general.items():
        path = Path(recipe.data.root) / file
        blocks = spread(task.prepare(read_rows(path), str(path)).examples, recipe.evaluate.limit)
        silo = Silo(name, parts.model, {"test": blocks}, {}, 0, tick)
        scalars = client(Request(name, 0, "evaluate", params, {"base": float(base)}), silo)[0].scalars
        if "loss" not in scalars:
            raise FedllmError(f"evaluate.general.{name}: '{path}' has no text to score; give another file.")
        losses[name] = scalars["loss"]
    return {"general": losses}
