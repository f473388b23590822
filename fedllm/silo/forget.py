"""Rows that are left out: named by a hash, so that whoever keeps the list of them does not keep their text."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence

from fedllm.silo.readers import Row
from fedllm.silo.spooled import spooled


def row_key(row: Row) -> str:
    """Return the SHA-256 of a row, whatever the order of its columns.

    >>> row_key({"a": 1, "b": 2}) == row_key({"b": 2, "a": 1}) != row_key({"a": 1})
    True
    """
    text = json.dumps(dict(row), sort_keys=True, ensure_ascii=False, default=str)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def forgetting(rows: Sequence[Row], keys: Collection[str]) -> Sequence[Row]:
    """Return the rows without those of these hashes, in their order."""
    gone = frozenset(keys)
    return spooled(row for row in rows if row_key(row) not in gone) if gone else rows
