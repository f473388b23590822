"""Open what a run made, or any adapter or model folder, to use it."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from fedllm.app.catalog import make
from fedllm.app.config import Recipe, read_recipe, read_toml
from fedllm.app.quiet import quiet_libraries
from fedllm.core.errors import FedllmError
from fedllm.runtime.store import load_checkpoint, read_events
from fedllm.silo.models import SMOLLM2, load_model, load_tokenizer, pick_device, pick_dtype
from fedllm.silo.trainables import parameters, trained, write


class Opened(NamedTuple):
    """A model that is ready to be used."""

    model: nn.Module
    tokenizer: Any
    recipe: Recipe | None
    """The run's, where it is one."""
    source: str
    """The model that it was made from, or the model itself."""
    note: str
    """What it is, for people."""
    as_base: Callable[[], AbstractContextManager[Any]] | None
    """A context in which the model answers as before, where it can be had so cheaply."""


def open_result(target: Path, base: bool = False, *, dtype: str | None = None, device: str | None = None) -> Opened:
    """Open a run, an adapter folder or a model folder; with `base` the model that it was made from.

    A run that has not come to its end gives what its last checkpoint holds. Type and device are the
    run's, as far as this machine has them, or `auto`, unless they are given.
    """
    quiet_libraries()
    if (target / "recipe.toml").is_file():
        return open_run(target, base, dtype, device)
    if (target / "adapter_config.json").is_file():
        return open_adapter(target, base, dtype, device)
    if (target / "config.json").is_file() or str(target) == SMOLLM2:
        model = load(str(target), dtype or "auto", device or "auto")
        return Opened(model, load_tokenizer(str(target)), None, str(target), f"the model {target}", None)
    raise FedllmError(
        f"There is no run, adapter or model in '{target}'; give a folder that `fedllm run` made, or one with "
        "adapter_config.json or config.json in it."
    )


def open_run(folder: Path, base: bool, dtype: str | None, device: str | None) -> Opened:
    """Open a run: its result if it has come to its end, else its last checkpoint."""
    recipe = read_recipe(read_toml(folder / "recipe.toml"))
    source, kind = recipe.model, dtype or recipe.dtype
    where = device or at_hand(recipe.device)
    if base:
        model = load(source, kind, where)
        return Opened(model, load_tokenizer(source), recipe, source, f"the base model {source}", nullcontext)
    finished = is_finished(folder)
    if recipe.algorithm["name"] != "averaging" and not (finished and (folder / "adapter").is_dir()):
        where = f"is the text in '{folder / 'prompt'}', to be put before what a model is asked"
        later = f"is there when it has come to its end; `fedllm resume {folder}` goes on"
        raise FedllmError(f"The result of '{recipe.algorithm['name']}' {where if finished else later}.")
    trainable = make("trainable", recipe.trainable, tokenizer=load_tokenizer(recipe.model))
    if finished and trainable.adapter:
        return open_adapter(folder / "adapter", False, kind, where)._replace(recipe=recipe, note=f"the run {folder}")
    if finished:
        model = load(str(folder / "model"), kind, where)
        return Opened(model, load_tokenizer(source), recipe, source, f"the run {folder}", None)
    kept = load_checkpoint(folder)
    if kept is None:
        raise FedllmError(f"The run '{folder}' has not come to the end of a round; `fedllm resume {folder}` goes on.")
    # Weights that are trained are checkpointed, and loaded, in float32.
    model = trainable.attach(load(source, kind if trainable.adapter else "float32", where), recipe.seed)
    write(trained(model), {**parameters(model), **kept.state.params})
    note = f"the run {folder} after round {kept.state.round} of {recipe.rounds}"
    as_base = model.disable_adapter if trainable.adapter else None
    return Opened(model, load_tokenizer(source), recipe, source, note, as_base)


def open_adapter(folder: Path, base: bool, dtype: str | None, device: str | None) -> Opened:
    """Open an adapter folder on the model that its config names."""
    from peft import PeftModel

    try:
        source = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))["base_model_name_or_path"]
    except (ValueError, KeyError, TypeError) as error:
        raise FedllmError(f"'{folder / 'adapter_config.json'}' does not name its base model; mend it.") from error
    plain: Any = load(source, dtype or "auto", device or "auto")
    if base:
        return Opened(plain, load_tokenizer(source), None, source, f"the base model {source}", nullcontext)
    try:
        model: Any = PeftModel.from_pretrained(plain, str(folder)).eval()
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        reason = str(error).strip().split("\n")[0][:160].rstrip(". ")
        raise FedllmError(f"The adapter '{folder}' does not fit '{source}' ({reason}); export it again.") from error
    own = str(folder) if (folder / "tokenizer_config.json").is_file() else source
    return Opened(model, load_tokenizer(own), None, source, f"the adapter {folder}", model.disable_adapter)


def load(source: str, dtype: str, device: str) -> nn.Module:
    """Load a model in a type and on a device by their names."""
    place = pick_device(device)
    return load_model(source, place, pick_dtype(dtype, place))


def at_hand(device: str) -> str:
    """Return the device a run used if this machine has it, else `auto`."""
    try:
        pick_device(device)
    except FedllmError:
        return "auto"
    return device


def is_finished(folder: Path) -> bool:
    """Say whether a run's result is written as a whole: nothing was trained since it was."""
    return [event["event"] for event in read_events(folder)[-1:]] == ["done"]


def spoken(opened: Opened) -> Any:
    """Return the tokenizer as the run used it: without its chat template where the task was plain text."""
    if opened.recipe and opened.recipe.task.get("template") == "plain":
        opened.tokenizer.chat_template = None
    return opened.tokenizer
