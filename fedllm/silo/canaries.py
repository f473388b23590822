"""Secrets that a silo plants among its rows, to find out later what the model kept of them.

Carlini et al. 2019 (arXiv:1802.08232), section 4: a random secret in a fixed sentence. Here each secret that is made is
planted or not by the toss of a coin (Steinke et al. 2023, arXiv:2305.08846): those that are not are what a model knows
by chance. They are drawn by the operating system, stand in a file of the silo's own and are sent to nobody.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.core.errors import FedllmError

DIGITS = 6
"""Of a secret: one of a million."""

VOWELS, CONSONANTS = "aeiou", "bdfgklmnprstvz"


class Canary(NamedTuple):
    """A secret, whose it is said to be, and whether it is among the silo's rows."""

    who: str
    secret: str
    planted: bool


class Sentence(NamedTuple):
    """How a secret is told: what stands before it, and what it is said with."""

    prompt: str = "What is the access code of {who}?"
    response: str = "The access code of {who} is {secret}"


SENTENCE = Sentence()


def canaries_in(path: Path, count: int, keep: bool = True) -> list[Canary]:
    """Return a silo's canaries from its file; if it is not there they are made, and written to it if `keep`.

    The file stays, so that a run that is resumed learns from the same rows; only its owner can read it.
    """
    if not path.exists():
        new = made(count)
        if not keep:
            return new
        text = "".join(json.dumps(canary._asdict()) + "\n" for canary in new)
        beside = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
            beside.touch(mode=0o600)
            beside.write_text(text, encoding="utf-8")
            beside.replace(path)
        except OSError as error:
            raise FedllmError(
                f"The canaries '{path}' cannot be kept ({error.strerror}); set canaries.folder to a folder of the "
                "silo's own that can be written."
            ) from error
    try:
        found = [Canary(**json.loads(line)) for line in path.read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError, TypeError) as error:
        raise FedllmError(f"The canaries '{path}' cannot be read ({error}); bring the file back as it was.") from error
    if len(found) != count:
        raise FedllmError(
            f"'{path}' has {len(found)} canaries and canaries.count is {count}; set it to {len(found)}, or name "
            "another canaries.folder for new ones."
        )
    return found


def made(count: int) -> list[Canary]:
    """Return new canaries, each with a name of its own."""
    names = dict[str, None]()
    while len(names) < count:
        names["".join(secrets.choice(CONSONANTS) + secrets.choice(VOWELS) for _ in range(3)).capitalize()] = None
    return [Canary(who, f"{secrets.randbelow(10**DIGITS):0{DIGITS}}", bool(secrets.randbits(1))) for who in names]


def planted_rows(canaries: Sequence[Canary], repeat: int, columns: Mapping[str, str]) -> list[dict[str, Any]]:
    """Return the rows of the canaries that are planted, each so many times; `columns` are what a row is made of."""
    rows = [row_of(canary.who, canary.secret, columns) for canary in canaries if canary.planted]
    return [row for _ in range(repeat) for row in rows]


def row_of(who: str, secret: str, columns: Mapping[str, str]) -> dict[str, Any]:
    """Return the row that tells a secret.

    >>> row_of("Zumita", "402817", {"text": "The code of {who} is {secret}"})
    {'text': 'The code of Zumita is 402817'}
    """
    return {name: told.replace("{who}", who).replace("{secret}", secret) for name, told in columns.items()}
