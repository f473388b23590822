"""What an administrator reads of a federation fits an ordinary terminal."""

from __future__ import annotations

from io import StringIO

import pytest
from rich.console import Console

from fedllm.app.office import status_table

RUN = {"state": "running", "reason": "", "attempt": 2, "user": "admin@example.org"}


@pytest.mark.parametrize("columns", [80, 120])
def test_a_run_with_a_long_last_word_is_one_line_with_all_that_it_is(columns):
    live = {"round": 1, "rounds": 6, "says": ["round 1 of 6: " + "10,077 tokens at 2,648/s, " * 9], "sites": {}}
    told = {"sites": {"a": {"revoked": False, "connected": True}}, "runs": {"tiny": {**RUN, "live": live}}}
    screen = Console(width=columns, file=StringIO())
    for part in status_table(told):
        screen.print(part)
    lines = [line.split() for line in screen.file.getvalue().splitlines()]
    assert lines[:2] == [["site", "connected"], ["a", "yes"]]
    assert lines[2] == ["run", "state", "rounds", "attempt", "started", "by", "last", "word"]
    assert lines[3][:9] == ["tiny", "running", "1", "of", "6", "2", "admin@example.org", "round", "1"]
    assert len(lines) == 4
