"""Who is asked: uniform, without replacement, at a rate, and the same again for the same round."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.exchange.select import everyone, fixed_size, poisson

NAMES = [f"silo{number}" for number in range(10)]


def test_everyone_is_asked_in_every_round():
    assert [list(everyone(NAMES)(number)) for number in range(3)] == [NAMES] * 3


@given(st.integers(1, 10), st.integers(0, 2**40), st.integers(0, 1000))
def test_a_fixed_size_is_drawn_without_replacement_and_in_the_silos_order(size, seed, number):
    asked = fixed_size(NAMES, size, seed)(number)
    assert len(asked) == len(set(asked)) == size
    assert asked == sorted(asked, key=NAMES.index)


@pytest.mark.parametrize("make", [lambda seed: fixed_size(NAMES, 3, seed), lambda seed: poisson(NAMES, 0.3, seed)])
def test_a_choice_depends_on_seed_and_round_only(make):
    select = make(5)
    backwards = [select(number) for number in reversed(range(20))][::-1]
    assert backwards == [make(5)(number) for number in range(20)]
    assert backwards != [make(6)(number) for number in range(20)]
    assert len(set(map(tuple, backwards))) > 10


def test_a_fixed_size_asks_all_alike():
    select = fixed_size(NAMES, 3, seed=1)
    counts = Counter(name for number in range(2000) for name in select(number))
    # 600 expected each; the standard deviation is sqrt(2000 * 0.3 * 0.7) = 20.5.
    assert counts.keys() == set(NAMES) and all(abs(count - 600) < 90 for count in counts.values())
    pairs = Counter(frozenset(select(number)[:2]) for number in range(2000))
    assert len(pairs) == 36


def test_poisson_asks_at_its_rate_and_sometimes_nobody():
    select = poisson(NAMES, 0.2, seed=1)
    sizes = [len(select(number)) for number in range(2000)]
    # Mean 2, variance 1.6; nobody with probability 0.8^10 = 0.107, deviation of the count 13.8.
    assert abs(sum(sizes) / 2000 - 2) < 0.12
    assert abs(sizes.count(0) - 215) < 60
    counts = Counter(name for number in range(2000) for name in select(number))
    assert all(abs(counts[name] - 400) < 80 for name in NAMES)


def test_poisson_at_rate_one_asks_everyone():
    assert all(poisson(NAMES, 1.0)(number) == NAMES for number in range(50))


@pytest.mark.parametrize("size", [0, -1, 11])
def test_a_size_that_the_silos_do_not_have_is_refused(size):
    with pytest.raises(FedllmError, match=rf"select.size is {size}; it must be between 1 and the 10 silos"):
        fixed_size(NAMES, size)


@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_that_is_no_probability_is_refused(rate):
    with pytest.raises(FedllmError, match=r"select\.rate is"):
        poisson(NAMES, rate)
