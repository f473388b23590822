"""Open a finished run for the attacks: its model as it came out, its text as the silos learned from it."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

from fedllm.app.build import Parts, build
from fedllm.app.config import Recipe, read_recipe, read_toml
from fedllm.app.progress import Ui
from fedllm.app.result import at_hand, is_finished
from fedllm.core.errors import FedllmError
from fedllm.core.types import State, Tensors
from fedllm.runtime.store import load_checkpoint, read_events
from fedllm.silo.trainables import trained, write


class Case(NamedTuple):
    """A run under audit."""

    folder: Path
    recipe: Recipe
    parts: Parts
    state: State
    """The server's after the last round."""
    secret: bytes
    """Of the noise: from the seed, since what an audit finds is told to nobody and so hides nothing."""
    seed: int
    trials: int
    tokens: int
    rows: int
    ui: Ui

    def reset(self) -> None:
        """Let the model be as the run left it."""
        write(trained(self.parts.model), {**self.parts.own, **self.state.params})

    @property
    def sum_only(self) -> bool:
        """Whether the server sees no silo's update, but their sum alone."""
        return any(step.facts.sees != "each" and step.where == "server" for step in self.parts.plan.steps)


def recipe_in(folder: Path) -> Recipe:
    """Return the recipe of a run whose silos are on this machine and that came to its end, or say what is amiss."""
    if not (folder / "recipe.toml").is_file():
        raise FedllmError(f"There is no run in '{folder}'; give the folder that `fedllm run` made.")
    recipe = read_recipe(read_toml(folder / "recipe.toml"))
    if any(event.get("runtime") == "federation" for event in read_events(folder)):
        raise FedllmError(
            f"The text of the run '{folder}' lies at its sites, and an audit needs it; rehearse the recipe with "
            "`fedllm run` on text like theirs, and audit that run."
        )
    if recipe.algorithm["name"] != "averaging":
        raise FedllmError(
            f"algorithm '{recipe.algorithm['name']}' sends no update and trains no weights, which is what an audit "
            "attacks; audit a run of algorithm 'averaging'."
        )
    if recipe.share["name"] == "product":
        raise FedllmError(
            f"The run '{folder}' sent products of LoRA's factors, and the attacks here are made for factors; audit the "
            "recipe with share.name = 'everything', whose updates show no less."
        )
    if recipe.homomorphic and recipe.homomorphic.tensors != ["*"]:
        raise FedllmError(
            f"In the run '{folder}' some tensors were encrypted and some not, and no attack here is made for that; "
            "audit a run with homomorphic.tensors = ['*'], or one without [homomorphic] to see what clear ones show."
        )
    if not is_finished(folder):
        raise FedllmError(
            f"The run '{folder}' has not come to its end; `fedllm resume {folder}` goes on, then audit it."
        )
    return recipe


def open_case(folder: Path, seed: int, trials: int, tokens: int, rows: int, ui: Ui) -> Case:
    """Build a run's parts again, with its last weights in the model."""
    recipe = recipe_in(folder)
    kept = load_checkpoint(folder)
    if kept is None:
        raise FedllmError(
            f"The run '{folder}' has no checkpoint, whose weights the attacks need; run the recipe again."
        )
    recipe = recipe.model_copy(update={"processes": 1, "runtime": "local", "device": at_hand(recipe.device)})
    secret = hashlib.blake2b(f"audit {seed}".encode(), digest_size=32).digest()
    with ui.part("opening model and text", None):
        parts = build(recipe, secret=secret)
    state = State(kept.state.round, *(moved(part, parts.params) for part in kept.state[1:]))
    case = Case(folder, recipe, parts, state, secret, seed, trials, tokens, rows, ui)
    case.reset()
    return case


def moved(tensors: Tensors, like: Tensors) -> Tensors:
    """Return tensors where those of a run are."""
    home = next(iter(like.values())).device
    return {name: value.to(home) for name, value in tensors.items()}
