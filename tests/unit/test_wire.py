"""Messages as bytes: what is packed comes back, sizes are known before, and garbage is only ever refused."""

from __future__ import annotations

import ast
import contextlib
import json
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import fedllm
from fedllm.core.errors import Refused
from fedllm.core.types import Reply, Request
from fedllm.runtime.meter import Traffic, metered
from fedllm.runtime.wire import CODES, message_bytes, reply_head, request_head
from tests.messages import pack, pack_reply, pack_request, unpack, unpack_reply, unpack_request

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=8)
NAMES = TEXT.filter(lambda name: name != "__metadata__")
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SCALARS = st.dictionaries(TEXT, FINITE, max_size=3)


@st.composite
def tensor(draw):
    shape = draw(st.lists(st.integers(0, 3), max_size=3))
    dtype = draw(st.sampled_from(list(CODES)))
    values = torch.randint(0, 2 if dtype == torch.bool else 100, shape, generator=torch.Generator().manual_seed(0))
    return (values / 7).to(dtype) if dtype.is_floating_point else values.to(dtype)


TENSORS = st.dictionaries(NAMES, tensor(), max_size=5)


def alike(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype
        and left[name].shape == right[name].shape
        and torch.equal(left[name], right[name])
        for name in left
    )


@settings(deadline=None)
@given(TEXT, st.integers(0, 2**40), TEXT, TENSORS, SCALARS)
def test_a_request_comes_back_as_it_was(client, number, op, tensors, scalars):
    back = unpack_request(pack_request(Request(client, number, op, tensors, scalars)))
    assert (back.client, back.round, back.op, back.scalars) == (client, number, op, scalars)
    assert alike(back.tensors, tensors)


@settings(deadline=None)
@given(TEXT, st.integers(0, 2**40), TENSORS, FINITE, SCALARS)
def test_a_reply_comes_back_as_it_was(client, number, tensors, weight, scalars):
    back = unpack_reply(pack_reply(Reply(client, number, tensors, weight, scalars)))
    assert (back.client, back.round, back.weight, back.scalars) == (client, number, weight, scalars)
    assert alike(back.tensors, tensors)


def test_bfloat16_crosses_as_bfloat16():
    value = torch.tensor([1.0, 2.5, -3e30], dtype=torch.bfloat16)
    data = pack({"x": value}, {})
    assert len(data) == len(pack({}, {})) + 8 * round((len(data) - len(pack({}, {})) - 6) / 8) + 6
    back, _ = unpack(data)
    assert back["x"].dtype == torch.bfloat16 and torch.equal(back["x"], value)


def test_a_view_is_sent_without_what_lies_behind_it():
    whole = torch.arange(1000.0)
    assert len(pack({"x": whole[:2]}, {})) < 200
    assert torch.equal(unpack(pack({"x": whole.view(10, 100).T}, {}))[0]["x"], whole.view(10, 100).T)


@settings(deadline=None, max_examples=200)
@given(TENSORS, st.dictionaries(TEXT, TEXT | FINITE | st.integers(), max_size=3))
def test_a_messages_length_is_known_before_it_is_made(tensors, head):
    assert message_bytes(tensors, {**head, "names": list(tensors)}) == len(pack(tensors, head))


def test_the_meter_counts_the_bytes_of_the_messages_but_for_the_order_of_their_tensors():
    tensors, own = {"x": torch.ones(3, 3)}, {"x": torch.ones(3, 3, dtype=torch.bfloat16), "é": torch.ones(1)}
    requests = [Request(name, 2, "train", tensors, {"lr": 0.1}) for name in ("a", "bé", "c")]
    replies = [Reply(name, 2, own, 1.5, {"loss": 0.5}) for name in ("a", "bé")]
    traffic = Traffic()
    assert list(metered(lambda asked: iter(replies), traffic)(requests)) == replies
    assert traffic.down == sum(message_bytes(r.tensors, request_head(r)) for r in requests)
    assert traffic.up == sum(message_bytes(r.tensors, reply_head(r)) for r in replies)
    for counted, messages in ((traffic.down, map(pack_request, requests)), (traffic.up, map(pack_reply, replies))):
        assert 0 <= sum(map(len, messages)) - counted < 50 * len(replies + requests)
    assert traffic.seconds > 0


REPLY = pack_reply(Reply("a", 1, {"x": torch.ones(2, 3), "y": torch.ones(4, dtype=torch.bfloat16)}, 2.0, {"loss": 1.0}))


def only_refused(data):
    """Unpack bytes that may be anything: a value or `Refused`, never another exception."""
    with contextlib.suppress(Refused):
        unpack_reply(data)


@settings(deadline=None, max_examples=300)
@given(st.binary(max_size=200))
def test_garbage_is_refused(data):
    with pytest.raises(Refused):
        unpack_reply(data)


@pytest.mark.parametrize("kept", range(len(REPLY)))
def test_a_message_cut_short_is_refused(kept):
    with pytest.raises(Refused):
        unpack_reply(REPLY[:kept])


@settings(deadline=None, max_examples=400)
@given(st.lists(st.tuples(st.integers(0, len(REPLY) - 1), st.integers(0, 255)), min_size=1, max_size=4))
def test_flipped_bytes_are_read_or_refused_but_never_crash(flips):
    data = bytearray(REPLY)
    for place, value in flips:
        data[place] = value
    only_refused(bytes(data))


def message(header, body=b""):
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + body


HEAD = {"client": "a", "round": 1, "weight": 1.0, "scalars": {}, "op": "train"}


def with_head(head):
    return message({"__metadata__": {"fedllm": head if isinstance(head, str) else json.dumps(head)}})


ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    "data",
    [
        message([]),
        message({}),
        message("null"),
        message({"__metadata__": None}),
        message({"__metadata__": {}}),
        message({"__metadata__": {"fedllm": 5}}),
        message({"__metadata__": {"fedllm": "not json"}}),
        message({"__metadata__": {"fedllm": "[]"}}),
        message(b"[" * 100_000),
        with_head("[" * 100_000),
        with_head('{"a":' * 100_000),
        with_head("5"),
        with_head({}),
        *(
            with_head({key: value for key, value in HEAD.items() if key != gone})
            for gone in ("client", "round", "scalars")
        ),
        with_head({**HEAD, "scalars": 5}),
        with_head({**HEAD, "scalars": {"loss": []}}),
        with_head({**HEAD, "scalars": {"loss": 10**400}}),
        with_head({**HEAD, "round": float("inf")}),
        with_head({**HEAD, "round": float("nan")}),
        with_head({**HEAD, "round": "one"}),
        with_head({**HEAD, "round": None}),
        with_head(json.dumps(HEAD).replace('"round": 1', '"round": 1' + "0" * 5000)),
        (2**63).to_bytes(8, "little") + b"{}",
        b"\xff" * 8 + b"{}",
        *(
            message({"__metadata__": {"fedllm": json.dumps(HEAD)}, "x": {**ENTRY, **lie}}, b"\0" * 8)
            for lie in (
                {"data_offsets": [0, 16]},
                {"data_offsets": [8, 0]},
                {"data_offsets": [-8, 0]},
                {"data_offsets": [0, 2**70]},
                {"shape": [2**40, 2**40]},
                {"shape": [-2]},
                {"shape": [3]},
                {"shape": "x"},
                {"dtype": "F99"},
                {"dtype": "F64"},
                {"dtype": 5},
            )
        ),
    ],
    ids=lambda data: repr(data[8:60]),
)
def test_a_header_that_lies_is_refused(data):
    with pytest.raises(Refused):
        unpack_reply(data)


@pytest.mark.parametrize("weight", [None, "heavy", [], 10**400])
def test_a_weight_that_is_no_number_is_refused(weight):
    with pytest.raises(Refused):
        unpack_reply(with_head({**HEAD, "weight": weight}))


@pytest.mark.parametrize("dtype", ["F8_E4M3", "F8_E5M2", "F8_E8M0", "F4", "F6_E2M3", "U16", "U32", "U64", "C64"])
def test_types_that_fedllm_does_not_send_are_read_or_refused(dtype):
    for shape in ([8], [16], [4], [2], [1]):
        header = {"__metadata__": {"fedllm": json.dumps(HEAD)}, "x": {**ENTRY, "dtype": dtype, "shape": shape}}
        only_refused(message(header, b"\0" * 8))


@settings(deadline=None, max_examples=200)
@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
        lambda inner: (
            st.lists(inner, max_size=3) | st.dictionaries(TEXT | st.sampled_from(list(HEAD)), inner, max_size=4)
        ),
        max_leaves=12,
    ),
    st.sampled_from([None, *HEAD]),
)
def test_whatever_a_head_says_is_read_or_refused(value, key):
    only_refused(with_head(value if key is None else {**HEAD, key: value}))


def test_nothing_in_the_package_can_unpickle():
    forbidden = {"pickle", "cloudpickle", "dill", "joblib", "shelve", "marshal"}
    for path in Path(fedllm.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                assert not forbidden & {alias.name.partition(".")[0] for alias in node.names}, path
            elif isinstance(node, ast.ImportFrom):
                assert (node.module or "").partition(".")[0] not in forbidden, path
            elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
                assert f"{node.value.id}.{node.attr}" not in {"torch.load", "torch.save", "np.load", "numpy.load"}, path
            elif isinstance(node, ast.keyword):
                assert node.arg not in {"allow_pickle", "weights_only"}, path
