"""The secret of a node, from which its noise is drawn: a file that only its owner can read, made once."""

from __future__ import annotations

import os
from pathlib import Path

from fedllm.core.errors import FedllmError
from fedllm.core.noise import SECRET_BYTES, fresh_secret
from fedllm.runtime.store import on_disk

NAME = "secret"


def secret_in(folder: Path, fresh: bytes | None = None) -> bytes:
    """Return the secret in a folder; one that is not there yet is made, or is the `fresh` one.

    Who has this file and a result can take the noise off again: it is never sent and not part of a result.
    """
    path = folder / NAME
    if not path.exists():
        beside = folder / f".{NAME}.{os.getpid()}"
        with on_disk(path):
            folder.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside.unlink(missing_ok=True)
            handle = os.open(beside, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
            try:
                os.write(handle, fresh or fresh_secret())
                os.fsync(handle)
            finally:
                os.close(handle)
            beside.rename(path)
    secret = path.read_bytes()
    if len(secret) != SECRET_BYTES:
        raise FedllmError(f"'{path}' has {len(secret)} bytes, not {SECRET_BYTES}; bring back the file as it was.")
    return secret
