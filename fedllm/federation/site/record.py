"""What a site did in a run: recorded replies and the node's memory, so that nothing is done twice.

A piece of work is three files of one stem in the run's folder: `.reply`, `.memory` if there is any, and
`.request`, a marker with the identity of the request and the hash of the reply. The marker is written last; without it
the others do not count. Markers of what is done once a round stay for good, the rest for the last `KEPT` rounds.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.core.errors import FedllmError
from fedllm.core.types import Request
from fedllm.federation.site.disk import move, on_disk, write
from fedllm.federation.site.rules import canonical

KEPT = 3

TRAIN, EVALUATE = "train", "evaluate"

ONCE = (TRAIN, "secure_keys", "secure_shares", "secure_sum", "homomorphic_open")
"""What a site does once a round: to train, and each phase of a sum, whose answers twice would tell more."""


class Done(NamedTuple):
    """A recorded piece of work."""

    op: str
    round: int
    request: str
    """What tells the request from all others."""
    reply: str
    """Key of the reply: the SHA-256 of its file."""
    size: int
    memory: bool
    stem: Path

    @property
    def path(self) -> Path:
        """The reply's file."""
        return beside(self.stem, ".reply")

    @property
    def kept(self) -> bool:
        """Whether the reply is still there."""
        return self.path.exists()


def beside(stem: Path, ending: str) -> Path:
    """Return the file of a stem with this ending; a stem may have dots of its own."""
    return stem.with_name(stem.name + ending)


def stem_of(folder: Path, request: Request, name: str) -> Path:
    """Return where a request's work is recorded: a round is trained once, while there may be many looks in it."""
    stem = f"{request.op}-{request.round:06d}"
    return folder / (stem if request.op in ONCE else f"{stem}-{name[:16]}")


def markers(folder: Path, pattern: str = "*") -> Iterator[Done]:
    """Yield the recorded work of a run, the last rounds first.

    Raises:
        FedllmError: for a marker that cannot be read.
    """
    for path in sorted(folder.glob(f"{pattern}.request"), reverse=True):
        try:
            said: dict[str, Any] = json.loads(path.read_bytes())
            stem = path.with_name(path.name.removesuffix(".request"))
            yield Done(**said, stem=stem)
        except FileNotFoundError:
            continue  # It was dropped for being old after its name was read.
        except (ValueError, TypeError, OSError) as error:
            raise FedllmError(f"The site's record '{path.name}' cannot be read ({error}); move it away.") from error


def find(folder: Path, request: str) -> Done | None:
    """Return what was recorded for a request."""
    return next((done for done in markers(folder) if done.request == request), None)


def with_reply(folder: Path, reply: str) -> Done | None:
    """Return the recorded work whose reply has this key and is still kept."""
    return next((done for done in markers(folder) if done.reply == reply and done.kept), None)


def done_once(folder: Path, op: str, number: int) -> Done | None:
    """Return what was recorded of a round's `op` that is done once."""
    return next(markers(folder, f"{op}-{number:06d}"), None)


def memory_before(folder: Path, number: int) -> Path | None:
    """Return what the node remembers from the last recorded training before a round, if anything.

    Raises:
        FedllmError: if that is so long ago that it is no longer kept.
    """
    last = next((done for done in markers(folder, f"{TRAIN}-*") if done.round < number), None)
    if last is None or not last.memory:
        return None
    path = beside(last.stem, ".memory")
    if not path.exists():
        raise FedllmError(
            f"What the site remembered after round {last.round} is no longer kept, so round {number} cannot be made "
            "again; start a new run."
        )
    return path


def keep(folder: Path, request: Request, name: str, reply: Path) -> Done:
    """Record a reply and the memory beside it (`reply + ".memory"`), durably and all together, and drop what is old.

    Raises:
        FedllmError: if the disk does not take it; then nothing is recorded.
    """
    stem = stem_of(folder, request, name)
    memory = beside(reply, ".memory")
    with reply.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    learned = request.op == TRAIN and memory.exists()
    done = Done(request.op, request.round, name, digest, reply.stat().st_size, learned, stem)
    with on_disk(done.path):
        move(reply, done.path)
        if done.memory:
            move(memory, beside(stem, ".memory"))
    said = {key: value for key, value in done._asdict().items() if key != "stem"}
    try:
        write(beside(stem, ".request"), canonical(said))
    except FedllmError:
        done.path.unlink()
        beside(stem, ".memory").unlink(missing_ok=True)
        raise
    drop_old(folder)
    return done


def drop_old(folder: Path) -> None:
    """Drop replies and memory of all but the last rounds, and all of all but the last looks."""
    looks = [done for done in markers(folder) if done.op not in ONCE]
    for done in [each for op in ONCE for each in list(markers(folder, f"{op}-*"))[KEPT:]]:
        done.path.unlink(missing_ok=True)
        beside(done.stem, ".memory").unlink(missing_ok=True)
    for done in sorted(looks, key=lambda look: age(beside(look.stem, ".request")), reverse=True)[KEPT:]:
        beside(done.stem, ".request").unlink(missing_ok=True)
        done.path.unlink(missing_ok=True)
        beside(done.stem, ".memory").unlink(missing_ok=True)


def age(path: Path) -> int:
    """Return when a file was written, in nanoseconds."""
    return path.stat().st_mtime_ns
