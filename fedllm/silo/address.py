"""The address of a database: parsed, filled in from the environment, and shown without its password."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

from fedllm.core.errors import FedllmError

if TYPE_CHECKING:
    from sqlalchemy import URL

VARIABLE = re.compile(r"\$\{([A-Za-z_][A-Za-z0-9_]*)\}")


def read_address(url: str) -> URL:
    """Return the parsed address with its `${NAME}` filled in from the environment."""
    try:
        from sqlalchemy import make_url
        from sqlalchemy.exc import ArgumentError
    except ModuleNotFoundError as error:
        raise missing(error) from error
    try:
        found = make_url(_filled(url) if VARIABLE.fullmatch(url) else url)
    except (ArgumentError, ValueError):
        raise FedllmError(
            "The address of the database cannot be read; write sqlite:///file or postgresql://user:${NAME}@host/name."
        ) from None  # the library's own sentence may repeat the address and so its password
    return found.set(  # filled in after the parse, so that a password may hold any character
        username=found.username and _filled(found.username),
        password=found.password and _filled(str(found.password)),
        host=found.host and _filled(found.host),
        database=found.database and _filled(found.database),
    )


def _filled(text: str) -> str:
    def value(match: re.Match[str]) -> str:
        name = match[1]
        if name not in os.environ:
            raise FedllmError(
                f"The address of the database needs the environment variable {name}; set it and try again."
            )
        return os.environ[name]

    return VARIABLE.sub(value, text)


def shown(address: URL) -> str:
    """Return the address as an error may show it: without password and options."""
    return address.set(query={}).render_as_string(hide_password=True)


def missing(error: ImportError) -> FedllmError:
    """Return what to say where the extra is not installed."""
    extra = "federation" if error.name == "sqlalchemy" else "postgres"
    return FedllmError(f"A database needs the package {error.name}; run: pip install 'fedllm[{extra}]'")
