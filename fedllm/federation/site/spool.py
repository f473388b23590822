"""What is being sent to a site, in chunks: a file is named by the hash of its bytes, so only the right bytes count."""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError, Refused
from fedllm.federation.site.disk import on_disk
from fedllm.runtime.line import Body

WAITING = 4
"""Files that are kept while nobody works on them, half ones too; the oldest makes room for a new one."""


class Spool:
    """The folder of those files; threads may share it. What a crash left in it is taken up where it stopped."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        self._folder, self._lock = folder, threading.Lock()
        self._whole, self._held = set[str](), Counter[str]()
        self._hashed: dict[str, tuple[Any, int]] = {}

    def put(self, key: str, offset: int, size: int, chunk: Body) -> int:
        """Take a chunk if it goes on where the file ends, and return the bytes that are there.

        Raises:
            Refused: for more bytes than `size`, or when all are there and are not what `key` says.
            FedllmError: if the disk does not take them; the bytes before the chunk stay.
        """
        path = self._folder / key
        with self._lock:
            if self._is_whole(key):
                return path.stat().st_size
            have = path.stat().st_size if path.exists() else 0
            if have > size or offset + len(chunk) > size:
                raise Refused(f"its chunk ends at {max(have, offset + len(chunk))} of a message of {size} bytes")
            if offset == have and chunk:
                self._make_room(key, size - have)
                append(path, chunk, have)
                self._hash(key, chunk, have)
                have += len(chunk)
            if have == size and not self._is_whole(key, look=True):
                path.unlink(missing_ok=True)
                raise Refused("the bytes of its message are not those of its key; send it again")
            return have

    def hold(self, key: str) -> Path | None:
        """Return the whole file and keep it until it is let go as often as held, or None if it is not all there."""
        with self._lock:
            if not self._is_whole(key, look=True):
                return None
            self._held[key] += 1
            return self._folder / key

    def let_go(self, key: str) -> None:
        """Let a file be dropped when room is needed."""
        with self._lock:
            self._held[key] -= 1
            self._held += Counter()  # Drops what is at 0.

    def _is_whole(self, key: str, look: bool = False) -> bool:
        path = self._folder / key
        if not path.exists():
            self._whole.discard(key)
        elif look and key not in self._whole:
            digest, hashed = self._hashed.pop(key, (None, 0))
            if digest is None or hashed != path.stat().st_size:
                with path.open("rb") as file:
                    digest = hashlib.file_digest(file, "sha256")
            if digest.hexdigest() == key:
                self._whole.add(key)
        return key in self._whole

    def _hash(self, key: str, chunk: Body, have: int) -> None:
        """Hash a chunk while it is in the cache; what a crash left of a file is hashed when it is whole."""
        digest, hashed = self._hashed.get(key) or (hashlib.sha256(), 0)
        if hashed == have:
            digest.update(chunk)
            self._hashed[key] = digest, have + len(chunk)

    def _make_room(self, key: str, needed: int) -> None:
        others = [path for path in self._folder.iterdir() if path.name not in {key, *self._held}]
        others.sort(key=lambda path: path.stat().st_mtime_ns)
        for path in others[: max(0, len(others) - WAITING + 1)]:
            self._whole.discard(path.name)
            self._hashed.pop(path.name, None)
            path.unlink()
        if shutil.disk_usage(self._folder).free < needed:
            raise FedllmError(
                f"The site has no room for a message of {needed / 1e6:.0f} MB; make room at the site, then ask again."
            )


def append(path: Path, chunk: Body, have: int) -> None:
    """Add a chunk to a file of `have` bytes, or leave the file as it was."""
    with on_disk(path):
        try:
            with path.open("ab", buffering=0) as file:
                rest = memoryview(chunk)
                while rest:
                    rest = rest[file.write(rest) :]
        except OSError:
            if path.exists():
                with path.open("r+b") as file:
                    file.truncate(have)
            raise
