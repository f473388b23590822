"""The line's messages: what is encoded comes back, and anything else is refused."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import Refused
from fedllm.runtime.line import LARGEST_HEAD, decode, encode, head_bytes

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)
HEADS = st.dictionaries(st.text(), JSON, max_size=4)


@given(HEADS, st.binary(max_size=100))
def test_what_is_encoded_comes_back(head, body):
    data = encode(head, body)
    assert decode(data) == (head, body)
    assert len(data) == head_bytes(head) + len(body)


def test_the_layout_is_the_length_of_the_head_then_the_head_then_the_body():
    assert encode({"a": 1}, b"xy") == b"\0\0\0\7" + b'{"a":1}' + b"xy"


@given(st.binary(max_size=60))
def test_garbage_is_read_or_refused(data):
    try:
        head, _ = decode(data)
    except Refused:
        return
    assert isinstance(head, dict)


@pytest.mark.parametrize("kept", range(len(encode({"do": "ping"}))))
def test_a_message_cut_short_is_refused(kept):
    with pytest.raises(Refused):
        decode(encode({"do": "ping"})[:kept])


def with_length(size, rest):
    return size.to_bytes(4, "big") + rest


@pytest.mark.parametrize(
    "data",
    [
        b"",
        with_length(0, b""),
        with_length(2, b"[]"),
        with_length(4, b"null"),
        with_length(3, b"{}"),
        with_length(2**32 - 1, b"{}"),
        with_length(LARGEST_HEAD + 2, json.dumps({"a": "x" * (LARGEST_HEAD - 6)}).encode()),
        with_length(100_000, b"[" * 100_000),
        with_length(2, b"\xff\xfe"),
        with_length(5006, b'{"a":' + b"9" * 5000 + b"}"),
    ],
    ids=lambda data: repr(data[:24]),
)
def test_a_message_that_lies_is_refused(data):
    with pytest.raises(Refused):
        decode(data)


@pytest.mark.parametrize("head", [{"a": float("nan")}, {"a": "x" * LARGEST_HEAD}])
def test_a_head_that_no_peer_would_take_is_not_made(head):
    with pytest.raises(ValueError):
        encode(head)
