"""A site's own column map: the names that a recipe uses, over the columns that the site has."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from fedllm.core.errors import FedllmError
from fedllm.silo.sources import Row, require_columns


def renamed(rows: Sequence[Row], columns: Mapping[str, str], where: str) -> list[dict[str, Any]]:
    """Return the rows under the recipe's names; `columns` is the recipe's name -> the site's own column.

    Columns that are not mapped stay as they are; one of them that is called like a recipe's name is an error.
    """
    require_columns(rows, list(columns.values()), where)
    mapped = set(columns.values())
    clashes = [name for name in columns if name not in mapped]
    for number, row in enumerate(rows, start=1):
        for name in clashes:
            if name in row:
                raise FedllmError(
                    f"{where}, row {number}, has a column {name!r} of its own, but the column map takes {name!r} from "
                    f"{columns[name]!r}; drop the entry or map the other column too, as old_{name} = {name!r}."
                )
    return [
        {name: row[here] for name, here in columns.items()}
        | {name: value for name, value in row.items() if name not in mapped}
        for row in rows
    ]
