"""Measure a result, with its base beside it: on a run's silos, or on files by what they hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeAlias

from rich.console import Console, Group
from rich.markup import escape
from rich.table import Table
from rich.text import Text
from torch import nn

from fedllm.app.catalog import make
from fedllm.app.config import Recipe
from fedllm.app.data import Silos, open_shards
from fedllm.app.progress import Ui
from fedllm.app.result import Opened, open_result, spoken
from fedllm.app.rows import open_rows
from fedllm.core.errors import FedllmError
from fedllm.core.types import Request, Silo
from fedllm.silo.evaluate import held_out
from fedllm.silo.objective import causal_loss
from fedllm.silo.tasks import Task
from fedllm.silo.trainables import full

Row = Mapping[str, Any]
Scores: TypeAlias = dict[str, str]
"""What is measured -> the number as text."""

SHAPES = (
    "question, choices, answer (multiple choice); prompt, answer (exact match); prompt, response or messages "
    "(instructions); text (plain)"
)


class Models(NamedTuple):
    """A result and, where there is one, the base it came from."""

    result: Opened
    base: nn.Module | None
    """None where the result's own model can answer as its base, or has none."""

    def each(self, measure: Callable[[nn.Module], Scores]) -> dict[str, Scores]:
        """Measure the base and the result."""
        found = {}
        if self.result.as_base:
            with self.result.as_base():
                found["base"] = measure(self.result.model)
        elif self.base is not None:
            found["base"] = measure(self.base)
        return {**found, "result": measure(self.result.model)}


def evaluate(target: Path, data: Sequence[str], limit: int) -> Group:
    """Measure a result on the files, at most `limit` rows of each, or on the held-out text of its run's silos."""
    opened = open_result(target)
    recipe = opened.recipe
    if not data and recipe is None:
        raise FedllmError(f"'{target}' is not a run, which has text of its own; name some with --data FILE.")
    tokenizer = spoken(opened)
    whole = recipe is not None and opened.as_base is None
    models = Models(opened, open_result(target, base=True).model if whole else None)
    table = Table()
    table.add_column("silo" if not data else "file", overflow="fold")
    table.add_column("measure")
    for kind in ("base", "result") if models.base is not None or opened.as_base else ("result",):
        table.add_column(kind, justify="right")
    with Ui(Console(stderr=True)) as ui:
        if recipe is not None and not data:
            silos = Silos(open_shards(recipe), make("task", recipe.task, tokenizer), tested=recipe.evaluate.examples)
            for name in silos.names:
                with ui.part(name, None):
                    tested = silos.examples(name)["test"]
                    found = models.each(loss_of(silos.task, tokenizer, tested, ui.tick))
                add_rows(table, name, found)
        for source in data:
            rows = open_rows(source, Path())[:limit]
            with ui.part(Path(source).name, None):
                found = models.each(measure_for(rows, source, tokenizer, recipe, ui.tick))
            add_rows(table, Path(source).name, found)
    return Group(Text(opened.note[0].upper() + opened.note[1:]), table)


def add_rows(table: Table, name: str, found: Mapping[str, Scores]) -> None:
    """Add a line for each measure of one file or silo."""
    for place, measure in enumerate(found["result"]):
        head = escape(name) if place == 0 else ""
        table.add_row(head, measure, *(scores[measure] for scores in found.values()))
    table.add_section()


def measure_for(
    rows: Sequence[Row], source: str, tokenizer: Any, recipe: Recipe | None, tick: Callable[[int], None]
) -> Callable[[nn.Module], Scores]:
    """Return how such rows are measured, by their columns."""
    from fedllm.evaluation.choice import multiple_choice
    from fedllm.evaluation.exact import exact_match

    columns = rows[0].keys()
    if {"question", "choices", "answer"} <= columns:
        return lambda model: share(
            "multiple choice", multiple_choice(model, tokenizer, rows, causal_loss(), where=source, tick=tick)
        )
    if {"prompt", "answer"} <= columns:
        return lambda model: share("exact match", exact_match(model, tokenizer, rows, where=source, tick=tick))
    task = task_for(rows[0], source, tokenizer, recipe)
    prepared = task.prepare(rows, source)
    if not prepared.examples:
        raise FedllmError(f"{source} has nothing to score in its first {len(rows)} rows; give other text or --limit.")
    return loss_of(task, tokenizer, prepared.examples, tick)


def task_for(row: Row, source: str, tokenizer: Any, recipe: Recipe | None) -> Task:
    """Return the run's task if its columns are there, else the one that the columns speak of."""
    tasks = [recipe.task] if recipe else []
    for part in [*tasks, {"name": "instruct"}, {"name": "causal"}]:
        task: Task = make("task", part, tokenizer)
        try:
            task.prepare([row], source)
        except FedllmError:
            continue
        return task
    raise FedllmError(f"{source} has the columns {', '.join(sorted(row))}; rename them to one of: {SHAPES}.")


def loss_of(
    task: Task, tokenizer: Any, examples: Sequence[Any], tick: Callable[[int], None]
) -> Callable[[nn.Module], Scores]:
    """Return how examples are measured: loss, perplexity, and accuracy where the task has one."""
    client = held_out(causal_loss(), task, tokenizer, full())

    def measure(model: nn.Module) -> Scores:
        silo = Silo("", model, {"test": examples}, {}, 0, tick)
        scalars = client(Request("", 0, "evaluate", {}), silo)[0].scalars
        loss = scalars["loss"]
        found = {"loss": f"{loss:.3f}", "perplexity": f"{math.exp(min(loss, 700)):,.2f}"}
        return found | {key: f"{scalars[key]:.1%}" for key in ("accuracy", "calibrated") if key in scalars}

    return measure


def share(name: str, result: Any) -> Scores:
    """Say a share of right answers with its standard error."""
    return {f"{name}, {result.n} questions": f"{result.accuracy:.1%} ± {result.error:.1%}"}
