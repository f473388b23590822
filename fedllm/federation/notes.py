"""Small JSON files by which the server's processes tell each other things; each has one writer."""

from __future__ import annotations

import json
import os
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError


def put(path: Path, table: dict[str, Any]) -> None:
    """Write a file by rename, so that a reader finds it whole."""
    put_text(path, json.dumps(table))


def put_text(path: Path, text: str) -> None:
    """Write a text by rename."""
    beside = path.with_name(f".{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with beside.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        beside.replace(path)
    except OSError as error:
        raise FedllmError(f"'{path}' cannot be written ({error.strerror or error}); make room there.") from error
    finally:
        beside.unlink(missing_ok=True)


def get(path: Path) -> dict[str, Any]:
    """Return what a file says, or nothing if it is not there yet."""
    with suppress(FileNotFoundError, ValueError):
        table = json.loads(path.read_text(encoding="utf-8"))
        return table if isinstance(table, dict) else {}
    return {}
