"""A site's column map renames what it names, keeps the rest, and is an error where it does not fit."""

from __future__ import annotations

import pytest

from fedllm.core.errors import FedllmError
from fedllm.silo.columns import renaming

ROWS = [{"id": 1, "frage": "Wo?", "antwort": "Hier."}, {"id": 2, "frage": "Wann?", "antwort": None}]
MAP = {"prompt": "frage", "response": "antwort"}


def all_of(rows, columns, where):
    return list(renaming(rows, columns, where))


def test_mapped_columns_have_the_recipes_names_and_the_rest_stays():
    assert all_of(ROWS, MAP, "my.csv") == [
        {"id": 1, "prompt": "Wo?", "response": "Hier."},
        {"id": 2, "prompt": "Wann?", "response": None},
    ]
    assert ROWS[0] == {"id": 1, "frage": "Wo?", "antwort": "Hier."}, "what came in is left alone"


def test_an_empty_map_changes_nothing():
    assert all_of(ROWS, {}, "my.csv") == ROWS
    assert all_of([], MAP, "my.csv") == []


def test_names_may_be_exchanged_kept_and_one_column_used_twice():
    rows = [{"a": 1, "b": 2}]
    assert all_of(rows, {"a": "b", "b": "a"}, "x") == [{"a": 2, "b": 1}]
    assert all_of(rows, {"a": "a"}, "x") == rows
    assert all_of(rows, {"text": "a", "prompt": "a"}, "x") == [{"text": 1, "prompt": 1, "b": 2}]


def test_a_missing_column_names_the_nearest():
    with pytest.raises(FedllmError, match=r"my\.csv, row 1, has no column 'antwortt'.* did you mean 'antwort'\?"):
        all_of(ROWS, {"response": "antwortt"}, "my.csv")
    with pytest.raises(FedllmError, match="row 3, has no column 'frage'"):
        all_of([*ROWS, {"antwort": "x"}], MAP, "my.csv")


def test_a_column_that_is_called_like_a_recipes_name_is_not_dropped_in_silence():
    with pytest.raises(FedllmError, match=r"my\.csv, row 1, has a column 'text' of its own.*map the other column too"):
        all_of([{"text": 7, "body": "long"}], {"text": "body"}, "my.csv")
    assert all_of([{"text": 7, "body": "x"}], {"text": "body", "old_text": "text"}, "y") == [
        {"text": "x", "old_text": 7}
    ]
