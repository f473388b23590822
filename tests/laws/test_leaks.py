"""No sequence of a silo's words leaves it, whatever the text, and what was found is counted."""

from __future__ import annotations

import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Reply, Request, Silo
from fedllm.silo.leaks import MARK, Guard, guarded, hider, strings

WORDS = st.sampled_from(["the", "a", "cat", "Dog", "naïve", "42", "sat", "x_y"])
MARKS = st.sampled_from([" ", ", ", "\n", " - ", "...", '" '])
TEXTS = st.lists(st.tuples(WORDS, MARKS), max_size=14).map(lambda pairs: "".join(a + b for a, b in pairs))


def sent_by(data, texts, guard, asked=(), kept=False):
    """What leaves a silo with this data whose client replies these texts."""

    def client(request, silo):
        return Reply(
            silo.name, request.round, {"other": torch.ones(2), **as_tensors("said", texts)}, 1.0, {"n": 3.0}
        ), {}

    silo = Silo("a", torch.nn.Identity(), {"texts": data}, {}, 0)
    request = Request("a", 0, "train", as_tensors("asked", asked))
    return guarded(client, guard)(request, silo)[0]


def sequences(text, n):
    """The n-grams of a text, said another way than in the code that is tested."""
    words = re.sub(r"[^\w]+", " ", text).lower().split()
    return {" ".join(words[place : place + n]) for place in range(len(words) - n + 1)}


@settings(deadline=None, max_examples=150)
@given(st.lists(TEXTS, max_size=3), st.lists(TEXTS, max_size=3), st.integers(1, 5), st.booleans())
def test_no_sequence_of_the_silos_words_passes(data, texts, n, block):
    reply = sent_by(data, texts, Guard(n, "block" if block else "redact"))
    secret = set().union(*(sequences(text, n) for text in data))
    for before, after in zip(texts, texts_in("said", reply.tensors), strict=True):
        assert not sequences(after, n) & secret
        if not sequences(before, n) & secret:
            assert after == before


@settings(deadline=None, max_examples=80)
@given(st.lists(TEXTS, max_size=3), TEXTS, TEXTS, st.integers(1, 4))
def test_what_the_server_sent_is_no_secret_from_it(data, text, asked, n):
    reply = sent_by(data, [text], Guard(n), [asked])
    secret = set().union(*(sequences(each, n) for each in data)) - sequences(asked, n)
    assert not sequences(texts_in("said", reply.tensors)[0], n) & secret


def test_what_was_found_is_counted_and_the_rest_of_the_reply_is_as_it_was():
    data = ["The patient lives in a small red house."]
    reply = sent_by(data, ["She LIVES -- in a (small) red barn", "fine"], Guard(4))
    assert texts_in("said", reply.tensors) == [f"She {MARK} barn", "fine"]
    assert reply.scalars == {"n": 3.0, "copied": 1.0, "personal": 0.0, "withheld": 0.0}
    assert reply.tensors["other"].tolist() == [1.0, 1.0]
    blocked = sent_by(data, ["She lives in a small red barn", "fine"], Guard(4, "block"))
    assert texts_in("said", blocked.tensors) == ["", "fine"]
    assert blocked.scalars["withheld"] == 1.0


def test_words_that_come_together_when_others_go_are_looked_at_again():
    data = ["b c d", "a e f"]
    reply = sent_by(data, ["a b c d e f"], Guard(3))
    assert "a" not in texts_in("said", reply.tensors)[0] or "e f" not in texts_in("said", reply.tensors)[0]


def test_a_row_is_looked_at_as_a_whole():
    assert list(strings({"id": 7, "messages": [{"role": "user", "content": "hi"}], "note": "x"})) == ["user", "hi", "x"]


def test_personal_data_is_hidden_and_counted():
    pytest.importorskip("presidio_analyzer")
    hide = hider(["EMAIL_ADDRESS"])
    reply = sent_by([], ["ask jane.doe@example.com today"], Guard(8, "redact", hide))
    assert texts_in("said", reply.tensors) == ["ask <EMAIL_ADDRESS> today"]
    assert reply.scalars["personal"] == 1.0
