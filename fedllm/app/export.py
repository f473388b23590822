"""A run's result for use elsewhere: the adapter as it is, or one plain model with it inside."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError

from fedllm.app.result import Opened, is_finished, open_result
from fedllm.core.errors import FedllmError
from fedllm.silo.models import model_folder
from fedllm.silo.trainables import export, merge


def export_run(folder: Path, to: Path | None = None, merged: bool = False) -> Path:
    """Write a run's result to a new folder and return it; with `merged` as one plain model."""
    made = written(folder)
    target = to or folder / ("merged" if merged else f"export/{made.name if made else 'adapter'}")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise FedllmError(f"'{target}' exists already; remove it or choose another folder with --to.")
    if made and not merged:
        with placing(target) as beside:
            shutil.copytree(made, beside, dirs_exist_ok=True)
        return target
    # In float32, so that merging rounds once, at the end.
    opened = open_result(folder, dtype="float32", device="cpu")
    model = plain(opened) if merged else opened.model
    with placing(target) as beside:
        export(model, beside)
        opened.tokenizer.save_pretrained(beside)
    return target


def written(folder: Path) -> Path | None:
    """Return the folder of a run's result once it is there as a whole."""
    if is_finished(folder):
        return next((folder / name for name in ("adapter", "model", "prompt") if (folder / name).is_dir()), None)
    return None


def plain(opened: Opened) -> Any:
    """Return the model with the adapter inside, in the type that its base has on disk."""
    from transformers import AutoConfig

    config = getattr(opened.model, "active_peft_config", None)
    model: Any = opened.model if config is None else merge(config.peft_type.value, opened.model)
    kind = getattr(AutoConfig.from_pretrained(model_folder(opened.source)), "dtype", None) or torch.float32
    model.config.dtype = kind
    return model.to(kind)


@contextmanager
def placing(target: Path) -> Iterator[Path]:
    """Yield a folder beside `target` that takes its place when it is whole."""
    beside = target.with_name(f".{target.name}.{os.getpid()}")
    try:
        beside.mkdir(parents=True, exist_ok=True)
        yield beside
        beside.rename(target)
    except (OSError, SafetensorError) as error:
        reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
        raise FedllmError(
            f"'{target}' cannot be written ({reason}); make room or choose another folder with --to."
        ) from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)
