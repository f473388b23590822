"""A site's own column map: the names that a recipe uses, over the columns that the site has."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from fedllm.core.errors import FedllmError
from fedllm.silo.sources import Row, require_columns


def renaming(rows: Iterable[Row], columns: Mapping[str, str], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows under the recipe's names as they come; `columns` is the recipe's name -> the site's own column.

    Columns that are not mapped stay as they are; one of them that is called like a recipe's name is an error.
    """
    mapped = set(columns.values())
    clashes = [name for name in columns if name not in mapped]
    for number, row in enumerate(rows, start=1):
        require_columns([row], list(columns.values()), where, number)
        for name in clashes:
            if name in row:
                raise FedllmError(
                    f"{where}, row {number}, has a column {name!r} of its own, but the column map takes {name!r} from "
                    f"{columns[name]!r}; drop the entry or map the other column too, as old_{name} = {name!r}."
                )
        named = {name: row[here] for name, here in columns.items()}
        yield named | {name: value for name, value in row.items() if name not in mapped}
