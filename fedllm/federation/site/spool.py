"""What is being sent to a site, in chunks: a file is named by the hash of its bytes, so only the right bytes count."""

from __future__ import annotations

import hashlib
import os
import shutil
import sys
import threading
from collections import Counter
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError, Refused
from fedllm.federation.site.disk import on_disk
from fedllm.runtime.line import Body

WAITING, DONE = 4, 1
"""Half files that are kept, and whole ones that nobody works on while another comes; the oldest make room."""

GOING = "-"
"""How the name of a file begins that makes room, as fast as the new one comes."""


class Spool:
    """The folder of those files; threads may share it. What a crash left in it is taken up where it stopped."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.glob(f"{GOING}*"):
            path.unlink()
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
                self._give_way(len(chunk))
                append(path, chunk, have)
                self._hash(key, chunk, have)
                have += len(chunk)
            if have == size:
                self._give_way(sys.maxsize)
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
        idle = [path for path in self._folder.iterdir() if path.name not in {key, *self._held}]
        idle = sorted((path for path in idle if path.name[0] != GOING), key=lambda path: path.stat().st_mtime_ns)
        whole = [path for path in idle if path.name in self._whole]
        half = [path for path in idle if path.name not in self._whole]
        for path in [*whole[: max(0, len(whole) - DONE)], *half[: max(0, len(half) - WAITING + 1)]]:
            self._whole.discard(path.name)
            self._hashed.pop(path.name, None)
            path.replace(self._folder / f"{GOING}{path.name}")
        going = sum(path.stat().st_size for path in self._folder.glob(f"{GOING}*"))
        if shutil.disk_usage(self._folder).free + going < needed:
            raise FedllmError(
                f"The site has no room for a message of {needed / 1e6:.0f} MB; make room at the site, then ask again."
            )

    def _give_way(self, size: int) -> None:
        """Free as many bytes of what has to go: memory is had again at once, where a host takes what is long free."""
        for path in self._folder.glob(f"{GOING}*"):
            left = path.stat().st_size - size
            if left > 0:
                os.truncate(path, left)
                return
            path.unlink()
            size = -left


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
