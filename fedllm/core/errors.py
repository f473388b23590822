"""The two ways in which something can be wrong: the user can mend it, or a silo's bytes are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class FedllmError(Exception):
    """One sentence for the user: what is wrong, where, and what to do. The command line exits with 2."""


class Refused(Exception):
    """A silo's reply that the server does not accept; the reply is dropped and counted, the round goes on."""


class Interrupted(Exception):
    """The user asked to stop; everything up to the last checkpoint is kept."""


def nearest(word: str, known: Iterable[str]) -> str:
    """Return a hint that names the known word nearest to `word`, or all of them when none is near.

    >>> nearest("larning_rate", ["learning_rate", "steps"])
    "did you mean 'learning_rate'?"
    """
    names = sorted(known)
    close = difflib.get_close_matches(word, names, n=1)
    return f"did you mean '{close[0]}'?" if close else f"known: {', '.join(names) or 'none'}."
