"""Cosine coefficients of an update, held against scipy's and against numbers worked out by hand."""

from __future__ import annotations

import numpy as np
import pytest
import scipy.fft
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.plan import size
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Work, on_meta
from fedllm.exchange.cast import cast
from fedllm.exchange.dct import backward, chunks, cosines, cuts, dct, forward, smallest, whole

SHAPES = st.lists(st.integers(1, 20), max_size=3).map(tuple)
SEEDS = st.integers(0, 2**32)


def drawn(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def there_and_back(transform, value):
    update = {"x": value}
    return transform.decode(transform.encode(update, {}, 0)[0], update)["x"]


@pytest.mark.parametrize("side", [1, 2, 3, 33, 64, 100])
def test_the_cosines_are_orthonormal(side):
    torch.testing.assert_close(cosines(side) @ cosines(side).T, torch.eye(side).double(), rtol=0, atol=1e-12)


def test_the_cosines_of_two_by_hand():
    torch.testing.assert_close(cosines(2), torch.tensor([[1.0, 1.0], [1.0, -1.0]]).double() / 2**0.5)


@pytest.mark.parametrize("shape", [(1, 7), (5, 5), (8, 3), (64, 64)])
def test_the_coefficients_are_scipys(shape):
    value = drawn(3, *shape)
    found = forward(value)
    expected = scipy.fft.dctn(value.numpy(), type=2, norm="ortho", axes=(1, 2))
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)
    torch.testing.assert_close(backward(found), value, rtol=0, atol=1e-12)


@settings(deadline=None, max_examples=100)
@given(SHAPES, st.integers(1, 9), SEEDS)
def test_chunks_make_up_the_tensor_and_hold_nothing_else(shape, chunk, seed):
    value = drawn(*shape, seed=seed)
    cut = chunks(value, chunk)
    y, x, rows, columns = cuts(value.shape, chunk)
    assert cut.shape == (rows * columns, y, x) and y <= chunk and x <= chunk
    # Chunks are of like size: less than one value a chunk is filled up, each way.
    assert rows * y - (shape[0] if len(shape) > 1 else 1) < rows
    assert torch.equal(whole(cut, value.shape, chunk), value)
    torch.testing.assert_close(cut.norm(), value.norm())


def test_chunks_by_hand():
    value = torch.arange(12.0).view(2, 6)
    assert chunks(value, 3).tolist() == [[[0, 1, 2], [6, 7, 8]], [[3, 4, 5], [9, 10, 11]]]
    assert chunks(torch.arange(5.0), 3).tolist() == [[[0, 1, 2]], [[3, 4, 0]]]


@settings(deadline=None, max_examples=60)
@given(SHAPES, st.integers(1, 9), SEEDS)
def test_all_coefficients_give_the_tensor_back(shape, chunk, seed):
    for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        value = drawn(*shape, seed=seed, dtype=dtype)
        back = there_and_back(dct(keep=81, chunk=chunk, beta=1.0), value)
        torch.testing.assert_close(back, value, rtol=0, atol=tolerance)


@settings(deadline=None, max_examples=40)
@given(SHAPES, st.integers(2, 9), SEEDS)
def test_the_more_is_kept_the_more_energy_there_is_and_the_less_error(shape, chunk, seed):
    value = drawn(*shape, seed=seed)
    energy, error = 0.0, float("inf")
    for keep in (1, 2, 4, 8, 16, 81):
        wire, _ = dct(keep, chunk, beta=0.0).encode({"x": value}, {}, 0)
        now = float(wire["x:values"].square().sum())
        # What is not sent is orthogonal to what is, in the coefficients; edges filled up can only take away.
        left = float(value.square().sum()) - now
        off = float((there_and_back(dct(keep, chunk, beta=0.0), value) - value).square().sum())
        assert now >= energy and now <= float(value.square().sum()) * (1 + 1e-9)
        assert off <= left + 1e-9 and left <= error + 1e-9
        energy, error = now, left


def test_a_cosine_takes_one_coefficient():
    i = torch.arange(64).double()
    wave = torch.outer(torch.cos(torch.pi * (2 * i + 1) * 5 / 128), torch.cos(torch.pi * (2 * i + 1) * 9 / 128)).float()
    wire, memory = dct(keep=1).encode({"x": wave}, {}, 0)
    # Row 5, column 9; each cosine has the norm sqrt(64 / 2).
    assert wire["x:positions"].tolist() == [[5 * 64 + 9]]
    assert wire["x:values"].tolist()[0] == pytest.approx([32.0])
    assert float(memory["x"].abs().max()) < 1e-5


def test_the_momentum_by_hand():
    # The DCT of a chunk of one value is the value: of 5, 1 chunks of one are all sent. A chunk of two sends its larger
    # coefficient, (a + b) / sqrt(2) or (a - b) / sqrt(2).
    transform, like = dct(keep=1, chunk=2, beta=0.5), {"x": torch.zeros(2)}
    wire, memory = transform.encode({"x": torch.tensor([3.0, 1.0])}, {}, 0)
    # 4 / sqrt(2) is the larger: the mean (2, 2) is sent and (1, -1) kept.
    torch.testing.assert_close(transform.decode(wire, like)["x"], torch.tensor([2.0, 2.0]))
    torch.testing.assert_close(memory["x"], torch.tensor([1.0, -1.0]))
    # Half of it and (1, -1) make (1.5, -1.5): all of that is the other coefficient.
    wire, memory = transform.encode({"x": torch.tensor([1.0, -1.0])}, memory, 1)
    assert wire["x:positions"].tolist() == [[1]]
    torch.testing.assert_close(transform.decode(wire, like)["x"], torch.tensor([1.5, -1.5]))
    torch.testing.assert_close(memory["x"], torch.zeros(2), rtol=0, atol=1e-6)


def test_algorithm_one_of_the_paper_round_by_round():
    # beta, chunks, coefficients and the sign as in the paper's listing, in scipy's words.
    beta, keep, silos = 0.9, 6, ["a", "b", "c"]
    transform = dct(keep, 8, beta, sign=True)
    algorithm = averaging(work=Work(None), select=lambda n: silos, aggregate=mean(), transforms=[transform])
    state = algorithm.init({"x": torch.zeros(16, 24)})
    memories, momenta = {silo: {} for silo in silos}, dict.fromkeys(silos, np.zeros((16, 24)))
    for number in range(4):
        replies, sent = [], np.zeros((16, 24))
        for place, silo in enumerate(silos):
            update = drawn(16, 24, seed=10 * number + place, dtype=torch.float32)
            wire, memories[silo] = transform.encode({"x": update}, memories[silo], 0)
            replies.append(Reply(silo, number, wire, 1.0))
            m = beta * momenta[silo] + update.double().numpy()
            q = np.zeros_like(m)
            for top in range(0, 16, 8):
                for left in range(0, 24, 8):
                    part = scipy.fft.dctn(m[top : top + 8, left : left + 8], norm="ortho")
                    part[np.abs(part) < np.sort(np.abs(part).ravel())[-keep]] = 0
                    q[top : top + 8, left : left + 8] = scipy.fft.idctn(part, norm="ortho")
            momenta[silo] = m - q
            sent += q / len(silos)
        before = state.params["x"]
        state, report = algorithm.server(state, lambda requests, replies=replies: iter(replies))
        assert report["clients"] == 3
        assert torch.equal(before - state.params["x"], torch.from_numpy(np.sign(sent)).float())
        for silo in silos:
            np.testing.assert_allclose(memories[silo]["x"].numpy(), momenta[silo], atol=1e-5)


def test_places_take_the_smallest_type_that_holds_them():
    assert [smallest(n) for n in (1, 256, 257, 2**15, 2**15 + 1)] == [
        torch.uint8, torch.uint8, torch.int16, torch.int16, torch.int32
    ]  # fmt: skip
    last = torch.zeros(256)
    last[255] = 1.0
    # The last of 256 places, which a signed byte would not hold.
    value = backward(last.view(1, 16, 16)).view(16, 16)
    wire, _ = dct(keep=1, chunk=16).encode({"x": value}, {}, 0)
    assert wire["x:positions"].tolist() == [[255]]
    torch.testing.assert_close(there_and_back(dct(keep=1, chunk=16), value), value, rtol=0, atol=1e-6)


def test_the_bits_a_value_are_those_that_are_said():
    like = {"x": torch.empty(2048, 512, device="meta")}
    wire, _ = dct().encode(like, {}, 0)
    assert 8 * size(wire.values()) / like["x"].numel() == 0.375
    assert 8 * size(cast().encode(wire, {}, 0)[0].values()) / like["x"].numel() == 0.25


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (65,), (3, 5, 7)])
def test_any_shape_comes_back_and_meta_tensors_say_what_travels(shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        update = {"x": drawn(*shape).to(dtype), "n": torch.arange(3)}
        wire, _ = dct(keep=3).encode(update, {}, 0)
        promised, _ = dct(keep=3).encode(on_meta(update), {}, 0)
        assert {n: (v.shape, v.dtype) for n, v in wire.items()} == {n: (v.shape, v.dtype) for n, v in promised.items()}
        back = dct(keep=3).decode(wire, update)
        assert back["x"].shape == shape and back["x"].dtype == dtype and torch.equal(back["n"], update["n"])


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"x:positions": torch.tensor([[0, 64]], dtype=torch.uint8)}, "outside of the 64 of a chunk"),
        ({"x:positions": torch.tensor([[3, 3]], dtype=torch.uint8)}, "do not rise"),
        ({"x:positions": torch.tensor([[3, 1]], dtype=torch.uint8)}, "do not rise"),
        ({"x:positions": torch.tensor([[1, 3]])}, "dtype"),
        ({"x:positions": torch.tensor([1, 3], dtype=torch.uint8)}, "shape"),
        ({"x:values": torch.zeros(1, 3)}, "shape"),
        ({"x:values": torch.tensor([[1.0, float("inf")]])}, "not finite"),
        ({"x:values": torch.tensor([[1.0, 3e38]])}, "too large"),
    ],
)
def test_what_no_silo_would_send_is_refused(change, reason):
    transform, update = dct(keep=2, chunk=8), {"x": drawn(8, 8, dtype=torch.float32)}
    wire, _ = transform.encode(update, {}, 0)
    with pytest.raises(Refused, match=reason):
        transform.decode({**wire, **change}, update)


@pytest.mark.parametrize(
    ("settings_of", "reason"), [({"keep": 0}, "keep"), ({"chunk": 0}, "chunk"), ({"beta": 1.5}, "beta")]
)
def test_settings_that_mean_nothing_are_refused(settings_of, reason):
    with pytest.raises(FedllmError, match=f"transforms.dct: .*{reason} is"):
        dct(**settings_of)
