"""Personal data that has a form is replaced and counted; what overlaps is replaced as a whole."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from pathlib import Path

import pytest

from fedllm.core.errors import FedllmError
from fedllm.silo.cleaning import clean
from fedllm.silo.pii import USUAL, Find, apart, found, pii, recognizer

PLACE = Path(__file__).resolve().parents[3] / "shared/data/safety/presidio_pii/synth_dataset_v2.json.gz"

LEAST = {"EMAIL_ADDRESS": 0.99, "CREDIT_CARD": 0.75, "IBAN_CODE": 0.9, "IP_ADDRESS": 0.99, "US_SSN": 0.99}
"""The share of each kind that has to be found as a whole."""


def test_finds_that_overlap_are_one_of_the_surest_kind():
    finds = [Find(8, 12, "URL", 0.5), Find(0, 5, "A", 0.4), Find(10, 20, "IP", 0.9), Find(19, 22, "URL", 0.9)]
    assert apart(finds) == [Find(0, 5, "A", 0.4), Find(8, 22, "IP", 0.9)]
    assert apart([Find(0, 5, "A", 0.4), Find(5, 6, "B", 0.4)]) == [Find(0, 5, "A", 0.4), Find(5, 6, "B", 0.4)]
    assert apart([]) == []


def test_an_unknown_kind_is_named_with_the_nearest():
    with pytest.raises(FedllmError, match="did you mean 'EMAIL_ADDRESS'"):
        pii(kinds=["EMAIL_ADRESS"])


@pytest.fixture(scope="module")
def presidio():
    return pytest.importorskip("presidio_analyzer", reason="the extra 'pii' is not installed")


def test_personal_data_is_replaced_and_counted(presidio):
    text = "Write to jo.doe@example.com or call +1 212-555-0123; card 4111 1111 1111 1111, from 10.0.0.1. Bye."
    done = clean([{"text": text, "id": 7}], [pii()])
    shown = "Write to <EMAIL_ADDRESS> or call <PHONE_NUMBER>; card <CREDIT_CARD>, from <IP_ADDRESS>. Bye."
    assert done.rows == [{"text": shown, "id": 7}]
    assert done.counts == {"read": 1, "kept": 1, **{f"0.pii.{kind}": 1 for kind in USUAL if f"<{kind}>" in shown}}


def test_other_columns_and_kinds_can_be_named(presidio):
    row = {"prompt": "see http://example.com/a", "response": "jo@example.com"}
    done = clean([row], [pii(["prompt", "response"], kinds=["URL"], score=0.5)])
    assert done.rows[0]["prompt"] == "see <URL>"
    assert "EMAIL" not in done.rows[0]["response"]


def test_mail_is_found_without_a_network(presidio, monkeypatch):
    import socket

    def refuse(*_, **__):
        raise AssertionError("the network was asked")

    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert clean([{"text": "a@b.co.uk"}], [pii()]).rows == [{"text": "<EMAIL_ADDRESS>"}]


@pytest.mark.skipif(not PLACE.exists(), reason="Presidio's rows are not on this machine")
def test_recall_on_presidios_own_rows(presidio):
    with gzip.open(PLACE) as file:
        rows = json.load(file)
    recognizers = [recognizer(kind, "valid") for kind in LEAST]
    whole, hit = Counter[str](), Counter[str]()
    for row in rows:
        spans = [span for span in row["spans"] if span["entity_type"] in LEAST]
        finds = apart(found(row["full_text"], recognizers, 0.4)) if spans else []
        for span in spans:
            whole[span["entity_type"]] += 1
            inside = (find.start <= span["start_position"] and span["end_position"] <= find.end for find in finds)
            hit[span["entity_type"]] += any(inside)
    assert {kind for kind in LEAST if hit[kind] < LEAST[kind] * whole[kind]} == set()
