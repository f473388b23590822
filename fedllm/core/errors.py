"""The two ways in which something can be wrong: the user can mend it, or a silo's bytes are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping, Sequence
from typing import Any


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


def first_problem(problems: Sequence[Mapping[str, Any]], known: Mapping[str, Iterable[str]]) -> str:
    """Say in one sentence what is wrong with a table; `problems` are those of a pydantic `ValidationError`.

    `known` are the keys of each table in it by its name, and of the whole under "".

    >>> first_problem([{"type": "extra_forbidden", "loc": ("data", "rot")}], {"": ["data"], "data": ["root"]})
    "the key 'data.rot' is unknown; did you mean 'root'?"
    """
    # A misspelled key is said before the key that is missing for it.
    problem = min(problems, key=lambda each: each["type"] != "extra_forbidden")
    keys = [str(key) for key in problem["loc"]]
    path = ".".join(keys)
    if problem["type"] == "extra_forbidden":
        return f"the key '{path}' is unknown; {nearest(keys[-1], known[keys[0] if len(keys) > 1 else ''])}"
    if problem["type"] == "missing":
        return f"'{path}' is missing; add it."
    message = str(problem["msg"]).removeprefix("Value error, ")
    return f"'{path}' is {problem['input']!r}; {message[0].lower()}{message[1:]}."
