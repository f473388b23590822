"""Files of a site that are there whole or not at all, and one sentence when its disk will not take them."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from safetensors import SafetensorError

from fedllm.core.errors import FedllmError


@contextmanager
def on_disk(path: Path) -> Iterator[None]:
    """Turn a failure to write `path` into one sentence, which names no folder since the server reads it too."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise FedllmError(
            f"The site cannot write '{path.name}' ({reason}); make room at the site, then ask again."
        ) from error


def sync(path: Path) -> None:
    """See a file's bytes, or a folder's names, safely on disk."""
    place = os.open(path, os.O_RDONLY)
    try:
        os.fsync(place)
    finally:
        os.close(place)


def move(beside: Path, path: Path) -> None:
    """Let a whole file take the place of `path`; it is on disk before its name is."""
    sync(beside)
    beside.replace(path)
    sync(path.parent)


def write(path: Path, data: bytes) -> None:
    """Write a file by rename.

    Raises:
        FedllmError: if it cannot be written; then nothing of it is left.
    """
    beside = path.with_name(f".{path.name}.new")
    with on_disk(path):
        try:
            beside.write_bytes(data)
            move(beside, path)
        finally:
            beside.unlink(missing_ok=True)
