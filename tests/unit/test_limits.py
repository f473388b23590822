"""At most so many rows of a silo: the first, or any, since a file may be sorted by label."""

from __future__ import annotations

from fedllm.app.config import Data
from fedllm.app.data import limited

ROWS = [{"label": "negative" if place < 50 else "positive", "text": str(place)} for place in range(100)]


def test_the_first_rows_of_a_sorted_file_are_all_of_one_kind_and_random_ones_are_not():
    first = limited(ROWS, 20, Data(), 0)
    assert first == ROWS[:20]
    drawn = limited(ROWS, 20, Data(limit_by="random"), 0)
    assert {row["label"] for row in drawn} == {"negative", "positive"} and len(drawn) == 20
    assert drawn == sorted(drawn, key=ROWS.index) == limited(ROWS, 20, Data(limit_by="random"), 0)
    assert drawn != limited(ROWS, 20, Data(limit_by="random"), 1)


def test_no_limit_and_few_rows_leave_all():
    for data in (Data(), Data(limit_by="random")):
        assert limited(ROWS, 0, data, 0) == ROWS and limited(ROWS[:3], 20, data, 0) == ROWS[:3]
