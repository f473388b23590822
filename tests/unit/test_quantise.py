"""Updates in 8 and 4 bits, with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.plan import plan, size
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Work, on_meta
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.dct import dct
from fedllm.exchange.quantise import one_a_byte, quantise, rounded_up, two_a_byte
from fedllm.exchange.top_k import top_k

BITS = pytest.mark.parametrize("bits", [4, 8])


def there_and_back(transform, value, seed=0):
    update = {"x": value}
    return transform.decode(transform.encode(update, {}, seed)[0], update)["x"]


def drawn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def test_four_bits_by_hand():
    # The largest of 14, -4, 3, 0.9 is 14, so a step is 14 / 7 = 2: the codes are 7, -2, 1.5 -> 2 (to even), 0.45 -> 0.
    transform = quantise(bits=4, block=4)
    update = {"x": torch.tensor([14.0, -4.0, 3.0, 0.9])}
    wire, memory = transform.encode(update, {}, 0)
    assert wire["x:scales"].tolist() == [2.0] and wire["x:scales"].dtype == torch.bfloat16
    # Two's complement, the first of two in the lower half: 7 and -2 = 14 make 7 + 14 * 16; 2 and 0 make 2.
    assert wire["x:codes"].tolist() == [7 + 14 * 16, 2] and wire["x:codes"].dtype == torch.uint8
    assert transform.decode(wire, update)["x"].tolist() == [14.0, -4.0, 4.0, 0.0]
    assert memory["x"].tolist() == pytest.approx([0.0, 0.0, -1.0, 0.9])
    # The next update is 0 but for the first value; on top of what was kept the largest is 3.5, a step 0.5.
    wire, memory = transform.encode({"x": torch.tensor([3.5, 0.0, 0.0, 0.0])}, memory, 0)
    assert transform.decode(wire, update)["x"].tolist() == [3.5, 0.0, -1.0, 1.0]
    assert memory["x"].tolist() == pytest.approx([0.0, 0.0, 0.0, -0.1])


def test_eight_bits_by_hand_with_a_block_that_is_not_full_and_one_that_is_zero():
    update = {"x": torch.tensor([[127.0, -1.4, 0.6], [0.0, 0.0, 0.0], [-254.0, 3.0, 4.9]])}
    wire, _ = quantise(bits=8, block=3).encode(update, {}, 0)
    assert wire["x:scales"].tolist() == [1.0, 0.0, 2.0]
    assert wire["x:codes"].tolist() == [127, -1, 1, 0, 0, 0, -127, 2, 2] and wire["x:codes"].dtype == torch.int8
    # Of a second block there is one value, and so one code.
    wire, _ = quantise(bits=8, block=2).encode({"x": torch.tensor([254.0, 2.0, -63.5])}, {}, 0)
    assert wire["x:scales"].tolist() == [2.0, 0.5] and wire["x:codes"].tolist() == [127, 1, -127]


@pytest.mark.parametrize(
    ("bits", "block", "expected"), [(8, 64, 8.25), (4, 64, 4.25), (4, 32, 4.5), (4, 1024, 4.015625)]
)
def test_the_bits_a_value_are_those_that_are_said(bits, block, expected):
    like = {"x": torch.empty(2048, 512, device="meta")}
    wire, _ = quantise(bits=bits, block=block).encode(like, {}, 0)
    assert 8 * size(wire.values()) / like["x"].numel() == expected


def test_scales_are_rounded_up_and_never_down():
    scales = drawn(10_000).abs() * 1e-4
    short = rounded_up(scales).float()
    assert bool((short >= scales).all()) and bool((short <= scales * (1 + 2**-7)).all())
    assert rounded_up(torch.tensor([0.0, 1.0, 1 + 2**-20])).tolist() == [0.0, 1.0, 1 + 2**-7]


@settings(deadline=None, max_examples=100)
@given(st.lists(st.integers(-8, 7), max_size=40))
def test_two_codes_a_byte_come_back(codes):
    packed = two_a_byte(torch.tensor(codes, dtype=torch.int8))
    assert packed.shape == ((len(codes) + 1) // 2,)
    assert one_a_byte(packed)[: len(codes)].tolist() == codes


@BITS
@settings(deadline=None, max_examples=100)
@given(st.integers(1, 300), st.integers(1, 70), st.sampled_from([1e-30, 1e-6, 1.0, 1e6]), st.integers(0, 2**32))
def test_no_value_is_off_by_more_than_half_a_step(bits, count, block, scale, seed):
    value = drawn(count, seed=seed) * scale
    back = there_and_back(quantise(bits=bits, block=block), value)
    largest = 2 ** (bits - 1) - 1
    for before, after in zip(value.split(block), back.split(block), strict=True):
        step = float(before.abs().max()) / largest * (1 + 2**-7)
        assert float((before - after).abs().max()) <= step / 2 * (1 + 1e-5)


@BITS
def test_stochastic_rounding_is_right_on_average_and_rounding_to_the_nearest_is_not(bits):
    # A value of 0.3 steps beside one that sets the scale: to the nearest it is always 0.
    largest = 2 ** (bits - 1) - 1
    value = torch.tensor([float(largest), 0.3, -0.3, 0.5, 1.25])
    chance = quantise(bits=bits, block=5, error_feedback=False, stochastic=True)
    found = there_and_back(chance, value.repeat(4000)).view(4000, 5)
    # A sample's spread is at most half a step, the mean's 0.5 / sqrt(4000) = 0.008.
    torch.testing.assert_close(found.mean(0), value, rtol=0, atol=0.035)
    assert float((found - value).abs().max()) < 1
    assert set(found[:, 1].tolist()) == {0.0, 1.0}
    assert there_and_back(quantise(bits=bits), value)[1] == 0


def test_chance_is_that_of_the_seed_and_the_name_alone():
    transform, update = quantise(bits=4, stochastic=True), {"a": drawn(500), "b": drawn(500)}
    one, again, other = (transform.encode(update, {}, seed)[0] for seed in (1, 1, 2))
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert not torch.equal(one["a:codes"], other["a:codes"])
    assert not torch.equal(one["a:codes"], one["b:codes"])


@BITS
@pytest.mark.parametrize("stochastic", [False, True])
def test_what_can_be_said_exactly_is(bits, stochastic):
    largest = 2 ** (bits - 1) - 1
    value = torch.arange(-largest, largest + 1).float() * 0.25
    assert torch.equal(there_and_back(quantise(bits, 1000, stochastic=stochastic), value), value)


@pytest.mark.parametrize("scale", [float("inf"), float("nan"), 1e38, -1e38, 1e30])
def test_a_scale_that_a_hostile_silo_sends_is_refused(scale):
    transform = quantise(bits=8)
    algorithm = averaging(
        work=Work(None), select=lambda n: ["good", "bad"], aggregate=mean(), transforms=[clip(1e9), transform]
    )
    params = {"x": torch.zeros(4)}
    good, _ = transform.encode({"x": torch.tensor([1.0, 2.0, 127.0, 4.0])}, {}, 0)
    bad = {**good, "x:scales": torch.tensor([scale]).to(torch.bfloat16)}
    with pytest.raises(Refused, match=r"not finite|too large"):
        transform.decode(bad, params)
    answers = [Reply("bad", 0, bad, 1.0), Reply("good", 0, good, 1.0)]
    after, report = algorithm.server(algorithm.init(params), lambda requests: iter(answers))
    assert "dropped.bad" in report
    assert after.params["x"].tolist() == [-1.0, -2.0, -127.0, -4.0]


@pytest.mark.parametrize(
    ("bits", "change", "reason"),
    [
        (8, {"x:codes": torch.tensor([-128, 0, 0, 0], dtype=torch.int8)}, "code below -127"),
        (4, {"x:codes": torch.tensor([0x80, 0], dtype=torch.uint8)}, "code below -7"),
        (8, {"x:codes": torch.zeros(5, dtype=torch.int8)}, "shape"),
        (4, {"x:codes": torch.zeros(4, dtype=torch.uint8)}, "shape"),
        (8, {"x:codes": torch.zeros(4)}, "dtype"),
        (8, {"x:scales": torch.zeros(1)}, "dtype"),
        (8, {"x:scales": torch.zeros(2, dtype=torch.bfloat16)}, "shape"),
        (8, {"y:scales": torch.zeros(1, dtype=torch.bfloat16)}, "1 unknown"),
    ],
)
def test_what_is_not_a_message_of_these_bits_is_refused(bits, change, reason):
    transform, update = quantise(bits=bits), {"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}
    wire, _ = transform.encode(update, {}, 0)
    with pytest.raises(Refused, match=reason):
        transform.decode({**wire, **change}, update)


@pytest.mark.parametrize("shape", [(), (1,), (0,), (0, 4), (65,), (3, 5, 7)])
@BITS
def test_any_shape_comes_back_and_meta_tensors_say_what_travels(bits, shape):
    for dtype in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
        update = {"x": drawn(*shape).to(dtype), "n": torch.arange(3)}
        transform = quantise(bits=bits)
        wire, _ = transform.encode(update, {}, 0)
        promised, _ = transform.encode(on_meta(update), {}, 0)
        assert {n: (v.shape, v.dtype) for n, v in wire.items()} == {n: (v.shape, v.dtype) for n, v in promised.items()}
        back = transform.decode(wire, update)
        assert back["x"].shape == shape and back["x"].dtype == dtype and torch.equal(back["n"], update["n"])


def bounds(*transforms):
    steps = plan(
        averaging(work=Work(None), select=None, aggregate=mean(), transforms=transforms), {"x": torch.zeros(4)}
    ).steps
    return {step.name: step.facts.norm_bound for step in steps if ":" in step.name}


def test_no_bound_is_claimed_for_what_was_rounded_and_the_servers_clip_gives_it_back():
    known = bounds(clip(1.0), quantise(bits=4))
    assert [known[name] for name in ("encode: clip", "encode: int4", "decode: int4")] == [1.0, None, None]
    assert known["decode: clip"] == known["aggregate: mean by examples"] == 1.0
    # The scales of a quantised update are clipped here, which says nothing of the update itself.
    known = bounds(quantise(bits=4, error_feedback=False), clip(1.0), cast())
    assert known["encode: clip"] == 1.0
    assert known["decode: int4"] is None and known["aggregate: mean by examples"] is None


def test_the_claim_is_needed_because_rounding_can_lengthen():
    value = torch.tensor([7.0, 0.6, 0.6, 0.6])
    assert float(there_and_back(quantise(bits=4, error_feedback=False), value).norm()) > float(value.norm())


def test_no_bound_is_claimed_of_what_error_feedback_adds_to():
    assert bounds(clip(1.0), top_k(0.5))["encode: top 0.5"] is None
    assert bounds(clip(1.0), top_k(0.5, error_feedback=False))["encode: top 0.5"] == 1.0
    assert bounds(clip(1.0), dct(), cast())["decode: clip"] == 1.0
    assert bounds(clip(1.0), dct(beta=0.0))["encode: DCT 32 of 64x64"] == 1.0
    # A silo without memory, or a server, shortens only; so a clip of what is sent holds for what is decoded.
    assert bounds(top_k(0.5), clip(1.0))["decode: top 0.5"] == 1.0


def test_a_block_must_be_one():
    with pytest.raises(FedllmError, match="block is 0"):
        quantise(block=0)
