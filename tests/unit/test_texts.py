"""Texts that travel as tensors come back as they were; bytes that are not texts are refused."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import Refused
from fedllm.core.texts import as_tensors, printable, texts_in
from tests.messages import pack, unpack


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=20), max_size=6))
def test_texts_come_back_over_the_wire_as_they_were_but_for_control_characters(texts):
    tensors, _ = unpack(pack(as_tensors("said", texts), {}))
    assert texts_in("said", tensors) == [printable(text) for text in texts]


@settings(deadline=None, max_examples=60)
@given(st.binary(max_size=12), st.lists(st.integers(-3, 15), max_size=4))
def test_any_other_bytes_are_texts_or_refused(data, ends):
    tensors = {"said.utf8": torch.tensor(list(data), dtype=torch.uint8), "said.ends": torch.tensor(ends).long()}
    try:
        texts = texts_in("said", tensors)
    except Refused:
        return
    assert "".join(texts).encode() == data
    assert len(texts) == len(ends)


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({}, "no texts"),
        ({"said.utf8": torch.zeros(1), "said.ends": torch.tensor([1])}, "not texts"),
        ({"said.utf8": torch.zeros(1, dtype=torch.uint8), "said.ends": torch.tensor([1])}, "control"),
        ({"said.utf8": torch.tensor([255], dtype=torch.uint8), "said.ends": torch.tensor([1])}, "UTF-8"),
        (as_tensors("said", ["a"] * 5), "5 texts"),
        (as_tensors("said", ["a" * 50]), "50 bytes"),
    ],
)
def test_what_is_refused_says_why(tensors, says):
    with pytest.raises(Refused, match=says):
        texts_in("said", tensors, most=4, longest=40)


def test_a_terminals_commands_do_not_travel():
    assert texts_in("said", as_tensors("said", ["a\x1b[2J\tb\r\n"])) == ["a [2J\tb \n"]
