"""Rows from a read-only query against PostgreSQL or SQLite, through SQLAlchemy.

The database itself enforces that nothing is written: SQLite opens the file read only and lets a statement do nothing
but select; PostgreSQL runs it as a cursor in a read-only transaction that is rolled back.
"""

from __future__ import annotations

import sqlite3
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from fedllm.core.errors import FedllmError
from fedllm.silo.address import missing, read_address, shown
from fedllm.silo.readers import first_line

if TYPE_CHECKING:
    from sqlalchemy import URL, Connection, Engine

BATCH = 1000
PATIENCE = 15
"""Seconds for a connection to come about, unless the address says `connect_timeout`."""

READ = "give one statement that only reads, such as SELECT."

SELECTING = {sqlite3.SQLITE_SELECT, sqlite3.SQLITE_READ, sqlite3.SQLITE_FUNCTION, sqlite3.SQLITE_RECURSIVE}
"""What a statement may do in SQLite."""


def read_query(url: str, query: str, folder: Path | None = None) -> list[dict[str, Any]]:
    """Return the rows of one read-only query; `url` may be `sqlite:///file` or `postgresql://user:${NAME}@host/name`.

    `${NAME}` stands for an environment variable, and `folder` is what the path of an SQLite file is relative to.
    """
    rows = list(stream_query(url, query, folder))
    if not rows:
        raise FedllmError(f"The query against {shown(read_address(url))} gave no rows; check its conditions.")
    return rows


def stream_query(url: str, query: str, folder: Path | None = None) -> Iterator[dict[str, Any]]:
    """Yield the rows as they come, in the database's order, with no more than a batch of them in memory."""
    from sqlalchemy.exc import SQLAlchemyError

    address = read_address(url)
    options = {"stream_results": True, "yield_per": BATCH, "no_parameters": True}
    engine = _engine(address, folder or Path())
    remedy = "check its address, user and password."
    try:
        with engine.connect() as connection:
            remedy = READ
            _forbid_writing(connection)
            result = connection.execution_options(**options).exec_driver_sql(query)
            if not result.returns_rows:
                _refuse(address, "it is no statement that gives rows")
            _require_different(list(result.keys()), address)
            for row in result.mappings():
                yield dict(row)
    except (SQLAlchemyError, sqlite3.Error, ValueError, OverflowError) as error:
        cause = getattr(error, "orig", None) or error
        _refuse(address, first_line(cause), remedy, error)
    finally:
        engine.dispose()


def _engine(address: URL, folder: Path) -> Engine:
    from sqlalchemy import create_engine
    from sqlalchemy.pool import NullPool

    match address.get_backend_name():
        case "sqlite":
            return create_engine("sqlite://", creator=_opener(address, folder), poolclass=NullPool)
        case "postgresql" | "postgres":
            wait = {} if "connect_timeout" in address.query else {"connect_timeout": PATIENCE}
            try:
                return create_engine(
                    address.set(drivername="postgresql+psycopg"), poolclass=NullPool, connect_args=wait
                )
            except ImportError as error:  # it is not there, or it finds no libpq
                raise missing(error) from error
        case other:
            raise FedllmError(f"The database {other!r} is not known; give the address of an sqlite or postgresql one.")


def _opener(address: URL, folder: Path) -> Callable[[], sqlite3.Connection]:
    file = folder / Path(address.database or "").expanduser()
    if not file.is_file():
        raise FedllmError(f"{file} is not a file; give the path of an SQLite database as sqlite:///path.")
    return lambda: sqlite3.connect(f"{file.resolve().as_uri()}?mode=ro", uri=True)


def _forbid_writing(connection: Connection) -> None:
    if connection.dialect.name == "postgresql":
        connection.execution_options(postgresql_readonly=True)
        return
    driver: Any = connection.connection.dbapi_connection
    driver.set_authorizer(lambda action, *_: sqlite3.SQLITE_OK if action in SELECTING else sqlite3.SQLITE_DENY)


def _require_different(names: Sequence[str], address: URL) -> None:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        _refuse(address, f"the column {twice!r} is there twice, rename one with AS")


def _refuse(address: URL, reason: str, remedy: str = READ, cause: Exception | None = None) -> NoReturn:
    for secret in (address.password, *(value for key, value in address.query.items() if "password" in key)):
        reason = reason.replace(str(secret), "***") if secret else reason
    raise FedllmError(f"{shown(address)} did not answer the query ({reason}); {remedy}") from cause
