"""The weighted mean: by hand, exact, and the same bits whoever answers first."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.aggregate import HELD, mean
from fedllm.core.errors import FedllmError
from fedllm.core.tensors import CHUNK


def average(updates, weights, how="examples"):
    fold = mean(how)
    total = fold.zero(updates[0])
    for update, weight in zip(updates, weights, strict=True):
        total = fold.add(total, update, weight)
    return fold.done(total)


def test_the_mean_is_weighted_by_examples():
    # (1 * 2 + 3 * 6) / 4 = 5 and (1 * 4 + 3 * 0) / 4 = 1.
    updates = [{"x": torch.tensor([2.0, 4.0])}, {"x": torch.tensor([6.0, 0.0])}]
    assert average(updates, [1.0, 3.0])["x"].tolist() == [5.0, 1.0]


def test_uniform_weights_count_every_silo_alike():
    updates = [{"x": torch.tensor([2.0, 4.0])}, {"x": torch.tensor([6.0, 0.0])}]
    assert average(updates, [1.0, 3.0], "uniform")["x"].tolist() == [4.0, 2.0]


def test_unknown_weights_are_refused():
    with pytest.raises(FedllmError, match="use 'examples' or 'uniform'"):
        mean("tokens")


@pytest.mark.parametrize("weight", [0.0, -1.0, float("inf"), float("nan")])
def test_a_weight_that_is_not_finite_and_positive_is_an_error(weight):
    fold = mean()
    with pytest.raises(ValueError, match="finite and positive"):
        fold.add(fold.zero({"x": torch.ones(1)}), {"x": torch.ones(1)}, weight)


@st.composite
def float32s(draw):
    """Draw zero or a full 24-bit significand anywhere in 20 octaves."""
    return (
        draw(st.sampled_from([-1, 0, 1]))
        * draw(st.integers(1 << 23, (1 << 24) - 1))
        * 2.0 ** draw(st.integers(-33, -13))
    )


ARRIVALS = st.lists(
    st.tuples(
        st.lists(float32s(), min_size=3, max_size=3),
        st.sampled_from([1.0, 7.0, 12_345.0, 1e6, 1 / 3, 0.1]) | st.integers(1, 1 << 20).map(float),
    ),
    min_size=1,
    max_size=12,
)


@settings(deadline=None, max_examples=150)
@given(ARRIVALS, st.randoms(use_true_random=False))
def test_any_order_of_arrival_gives_the_same_bits(arrivals, chance):
    shuffled = chance.sample(arrivals, len(arrivals))
    results = [
        average([{"x": torch.tensor(values)} for values, _ in order], [weight for _, weight in order])["x"]
        for order in (arrivals, shuffled, arrivals[::-1])
    ]
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def test_any_order_gives_the_same_bits_where_a_plain_sum_does_not():
    draw = torch.Generator().manual_seed(0)
    scales = 10.0 ** torch.linspace(-6, 6, 40)
    updates = [{"x": torch.randn(CHUNK + 5, generator=draw) * scale} for scale in scales]
    weights = [1 / 3, 1e6, 17.0, 1e-3] * 10
    order = list(range(40))
    first = average(updates, weights)["x"]
    plain = sum(update["x"] * weight for update, weight in zip(updates, weights, strict=True))
    differs = False
    for seed in range(3):
        random.Random(seed).shuffle(order)
        again = average([updates[place] for place in order], [weights[place] for place in order])["x"]
        assert torch.equal(first, again)
        differs |= not torch.equal(plain, sum(updates[place]["x"] * weights[place] for place in order))
    assert differs


@settings(deadline=None, max_examples=150)
@given(ARRIVALS)
def test_the_mean_is_the_exact_one_rounded_to_float32(arrivals):
    got = average([{"x": torch.tensor(values)} for values, _ in arrivals], [weight for _, weight in arrivals])["x"]
    whole = sum(Fraction(weight) for _, weight in arrivals)
    for place in range(3):
        products = [Fraction(values[place]) * Fraction(weight) for values, weight in arrivals]
        exact = sum(products) / whole
        # Half a unit of float32 in the last place, and what float64 lost of the products.
        allowed = abs(exact) * Fraction(1, 1 << 24) * (1 + Fraction(1, 1 << 20))
        allowed += sum(map(abs, products)) / whole / (1 << 52)
        assert abs(Fraction(got[place].item()) - exact) <= allowed


def test_thousands_of_small_updates_do_not_drown_in_a_large_one():
    # float32: 2^24 + 1 + 1 + ... stays 2^24. Here (2^24 + 4096) / 4097 comes out as it is.
    updates = [{"x": torch.tensor([2.0**24])}] + [{"x": torch.tensor([1.0])}] * 4096
    assert average(updates, [1.0] * 4097)["x"].item() == torch.tensor((2**24 + 4096) / 4097).item()


def test_names_shapes_and_dtypes_are_kept():
    update = {"a": torch.ones(2, 3), "b": torch.ones(()), "c": torch.ones(4, dtype=torch.bfloat16)}
    result = average([update, update], [1.0, 2.0])
    assert {name: (value.shape, value.dtype) for name, value in result.items()} == {
        name: (value.shape, value.dtype) for name, value in update.items()
    }
    assert all(torch.equal(result[name], update[name]) for name in update)


def test_updates_are_not_changed():
    update = {"x": torch.tensor([1.0, 2.0])}
    fold = mean()
    total = fold.add(fold.zero(update), update, 3.0)
    assert fold.done(total)["x"].tolist() == update["x"].tolist() == [1.0, 2.0]


def test_done_can_be_asked_twice():
    fold = mean()
    total = fold.add(fold.zero({"x": torch.ones(1)}), {"x": torch.tensor([3.0])}, 2.0)
    assert fold.done(total)["x"].item() == fold.done(total)["x"].item() == 3.0


def test_the_fold_holds_two_float64_words_a_value_however_many_come():
    like = {"x": torch.zeros(1000), "y": torch.zeros(10, 10)}
    fold = mean()
    total = fold.zero(like)

    def memory():
        return {part.data_ptr() for part in [*total.high, *total.low, *total.spare.values(), total.scratch]}

    held = memory()
    for _ in range(50):
        total = fold.add(total, {"x": torch.rand(1000), "y": torch.rand(10, 10)}, 5.0)
    assert memory() == held
    assert sum(part.numel() * part.element_size() for part in [*total.high, *total.low]) == 2 * 8 * 1100
    assert set(total._fields) == {"high", "low", "spare", "scratch", "like", "weight", "waiting"} and total.like is like


def test_small_updates_wait_for_each_other_and_never_more_than_a_few_megabytes_of_them():
    fold, update = mean(), {"x": torch.ones(HELD // 4 // 4)}
    total = fold.zero(update)
    waiting = []
    for _ in range(9):
        total = fold.add(total, update, 1.0)
        waiting.append(len(total.waiting))
    assert waiting == [1, 2, 3, 0, 1, 2, 3, 0, 1], "four of them are what may be held"
    assert torch.equal(fold.done(total)["x"], update["x"]), "the last, still waiting, is in the mean"
