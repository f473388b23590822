"""What the commands share: the terminal, and how an error ends a command."""

from __future__ import annotations

import sys
from typing import Annotated, NoReturn

import typer
from rich.console import Console
from rich.text import Text

out, err = Console(), Console(stderr=True)

Settings = Annotated[
    list[str],
    typer.Option("--set", help="Put key.path=value over the recipe; may be repeated.", show_default=False),
]


def say(text: str) -> None:
    """Print a line as it is, not broken where a path would be cut."""
    out.print(text, highlight=False, markup=False, soft_wrap=True)


def fail(sentence: str, code: int = 2) -> NoReturn:
    """Print what is wrong and end."""
    # Brackets in a sentence are the user's or a recipe's, not colours.
    err.print(Text.assemble(("Error:", "red"), " ", sentence), highlight=False, soft_wrap=True)
    sys.exit(code)


def many(number: int, what: str) -> str:
    """Return a number of things in words.

    >>> many(1, "silo"), many(3, "silo")
    ('1 silo', '3 silos')
    """
    return f"{number:,} {what}{'' if number == 1 else 's'}"


def amount(count: float) -> str:
    """Return bytes in the unit that reads best.

    >>> amount(1536)
    '1.5 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} B" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError
