"""A server that trains nothing holds no weights but those of its state: neither what it began with nor the model's."""

from __future__ import annotations

from pathlib import Path

from fedllm.app.build import Parts
from fedllm.core.room import give_back, room_for
from fedllm.runtime.remote import LARGE
from fedllm.runtime.spool import open_message, save_message
from fedllm.runtime.store import on_disk
from fedllm.silo.trainables import trained


def can_be_lean(parts: Parts) -> bool:
    """Say whether the parameters are all of a large model, and are used here for nothing but rounds and the result."""
    scores = parts.recipe.evaluate.choice or parts.recipe.evaluate.exact
    large = sum(value.nbytes for value in parts.params.values()) > LARGE
    return large and not (parts.method or parts.trainable.adapter or scores)


def lean(parts: Parts, folder: Path) -> Parts:
    """Put what a run begins with into a file of that folder, without a name, and let go of the model's weights.

    The parameters are read from there when they are asked for. The model's weights are unset: memory is theirs again
    once they are written, as they are before it is looked at or exported.
    """
    if not can_be_lean(parts):
        return parts
    path = folder / "first"
    with on_disk(path):
        folder.mkdir(parents=True, exist_ok=True)
        save_message(path, parts.params, {})
        first, _ = open_message(path)
        path.unlink()
    for value in trained(parts.model).values():
        # Of memory that is its own the system gives nothing before it is written to.
        value.data = room_for(value)
    give_back()
    return parts._replace(params=first)
