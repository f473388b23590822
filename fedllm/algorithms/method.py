"""How an algorithm that is more than local training and an average is built and driven: what it gets, what it gives.

A recipe names one with `[algorithm]`; the catalogue has its function: `name(ground, **keys) -> Method`, `ground` being
what the run stands on and the keys those of the table. `app/run.py` then drives it through the same rounds,
checkpoints, events and exchanges as any average.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fedllm.core.errors import FedllmError
from fedllm.core.types import (
    Aggregator,
    Algorithm,
    Client,
    Dataset,
    Exchange,
    Report,
    Select,
    Silo,
    State,
    Tensors,
    Transform,
)
from fedllm.silo.objective import Objective
from fedllm.silo.questions import Asking
from fedllm.silo.speaker import Speaker
from fedllm.silo.tasks import Task
from fedllm.silo.trainables import Trainable


def nobody(silo: Silo) -> Speaker:
    """Say that there is nobody to ask."""
    raise FedllmError("This run has no model that could be asked.")


class Ground(NamedTuple):
    """What a run stands on: the parts that its recipe names beside the algorithm."""

    names: Sequence[str]
    """The silos."""
    rounds: int
    seed: int
    model: nn.Module
    """With the trainable attached; for a plan it has shapes only (on the meta device)."""
    tokenizer: Any
    task: Task
    trainable: Trainable
    objective: Objective
    aggregate: Aggregator
    transforms: Sequence[Transform] = ()
    batch_size: int = 16
    """Rows that are scored at a time."""
    asking: Asking | None = None
    """How the task's rows are asked in plain text; a silo's data then has them as `questions` and `tests`."""
    speaker: Callable[[Silo], Speaker] = nobody
    """The model as text in and text out, here or behind an API."""
    guard: Callable[[Client], Client] = lambda client: client
    """Lets a client's texts leave only without copies of the silo's own and personal data."""
    rows: Callable[[str], Sequence[Mapping[str, Any]]] = lambda source: []
    """Reads a file that is named like the silos' own; only the server does."""


class Method(NamedTuple):
    """An algorithm with what a run needs beside it."""

    name: str
    start: Tensors
    """What `Algorithm.init` gets."""
    algorithm: Callable[[Select], Algorithm]
    """The algorithm over the silos that are selected: those of the recipe, or one that works alone."""
    evaluator: Client
    """Answers `evaluate` for what `shown` gives."""
    export: Callable[[nn.Module, Tensors, Path], None]
    """Writes what was learned, as `shown` gives it, into a folder."""
    folder: str = "prompt"
    """The name of that folder in the run's."""
    shown: Callable[[State], Tensors] = lambda state: state.params
    """What of the state is evaluated and exported; small, since it goes to every silo that is looked at."""
    steps: Callable[[Dataset], int] = lambda data: 1
    """How often a client with this data ticks in a round."""
    ops: Sequence[str] = ("train",)
    """What the client can be asked; a round asks a silo to `train` once at most, since a site keeps count by it."""
    weights: bool = True
    """Whether it needs the model's weights, and so cannot work with a model behind an API."""
    notes: Sequence[tuple[str, str]] = ()
    """Lines of the plan: a word and what it costs, sends or may spend."""


def only(name: str) -> Select:
    """Select one silo in every round: how it works alone."""
    return lambda number: [name]


def rounds_of(method: Method, select: Select, exchange: Exchange, rounds: int) -> Iterator[tuple[State, Report]]:
    """Run a method from its start over the silos that are selected; yield the state after each round."""
    algorithm = method.algorithm(select)
    state = algorithm.init(method.start)
    for _ in range(rounds):
        state, report = algorithm.server(state, exchange)
        yield state, report


def require_no_transforms(name: str, ground: Ground) -> None:
    """Refuse transforms and aggregates for a method whose replies are not an update that could be averaged."""
    if ground.transforms:
        raise FedllmError(
            f"algorithm '{name}' sends no update that '{ground.transforms[0].name}' could change; take [[transforms]] "
            "out."
        )
    if not ground.aggregate.name.startswith("mean"):
        raise FedllmError(f"algorithm '{name}' merges in its own way, without aggregate.name; take [aggregate] out.")
