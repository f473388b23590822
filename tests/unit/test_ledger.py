"""The ledger has every look at the text once, whatever is repeated or killed."""

from __future__ import annotations

import json
import random

import pytest

from fedllm.core.errors import FedllmError
from fedllm.exchange.accounting import Mechanism, epsilon
from fedllm.exchange.ledger import Entry, note, read_ledger, spent

NOISE = Mechanism(2.0, "poisson", 0.1)


def entry(number, mark="m", silo="", unit="silo", mechanism=NOISE):
    return Entry(number, "training", unit, silo, mark, mechanism)


def test_a_repeated_round_is_noted_once_and_another_draw_again(tmp_path):
    path = tmp_path / "ledger.jsonl"
    assert note(path, [entry(1), entry(2)]) == [entry(1), entry(2)]
    assert note(path, [entry(2), entry(3), entry(3)]) == [entry(1), entry(2), entry(3)] == read_ledger(path)
    assert note(path, [entry(3, mark="other")])[-1] == entry(3, mark="other")
    assert len(path.read_text().splitlines()) == 4 and path.stat().st_mode & 0o077 == 0


def test_what_a_kill_left_of_a_line_is_written_over(tmp_path):
    """Cut at every byte, the ledger of a repeated run is that of the straight one."""
    path, whole = tmp_path / "ledger.jsonl", [entry(number) for number in (1, 2, 3)]
    for each in whole:
        note(path, [each])
    straight = path.read_bytes()
    for cut in random.Random(0).sample(range(len(straight)), 60):
        path.write_bytes(straight[:cut])
        for each in whole[straight[:cut].count(b"\n") :]:
            note(path, [each])
        assert path.read_bytes() == straight


def test_a_ledger_that_was_tampered_with_is_not_passed_over(tmp_path):
    path = tmp_path / "ledger.jsonl"
    for line in ("{}", "[]", "nonsense", json.dumps({**entry(1)._asdict(), "mechanism": {"sigma": 1}})):
        path.write_text(line + "\n")
        with pytest.raises(FedllmError, match="without it no epsilon can be stated"):
            read_ledger(path)


def test_each_silo_has_what_was_done_with_its_own_text_and_with_all(tmp_path):
    own = Mechanism(1.0)
    ledger = [entry(1), entry(1, "", "a", mechanism=own), entry(2, "", "b", "record", own), entry(2, "", "a")]
    found = {name: each.best for name, each in spent(ledger, "silo", 1e-5).items()}
    assert found == {"a": epsilon([NOISE, own, NOISE], 1e-5)}
    assert {name: each.best for name, each in spent(ledger, "record", 1e-5).items()} == {"b": epsilon([own], 1e-5)}
    assert spent([], "silo", 1e-5) == {}
    assert spent([entry(1)], "silo", 1e-5)[""].best == epsilon([NOISE], 1e-5)
