"""Epsilon: dp-accounting's own numbers, those of two papers, and that it moves the way it must."""

from __future__ import annotations

import math

import dp_accounting as dp
import pytest
from dp_accounting import pld, rdp
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.exchange.accounting import ORDERS, Mechanism, bounds, epsilon, epsilons, event, noise_for


def moments(rate, multiplier, times, delta):
    """Epsilon as the papers of that time had it: whole orders up to 33, and log(1 / delta) / (order - 1) added."""
    orders = list(range(2, 34))
    accountant = rdp.RdpAccountant(orders)
    accountant.compose(event(Mechanism(multiplier, "poisson", rate, times=times), False))
    return min(r + math.log(1 / delta) / (order - 1) for r, order in zip(accountant.rdp, orders, strict=True))


def test_abadi_2016_the_moments_accountant_of_their_section_3_1():
    # "q = 0.01, sigma = 4, delta = 1e-5 and T = 10000: epsilon is about 1.26".
    assert moments(0.01, 4.0, 10_000, 1e-5) == pytest.approx(1.26, abs=0.005)
    assert epsilon([Mechanism(4.0, "poisson", 0.01, times=10_000)], 1e-5) == pytest.approx(0.95, abs=0.015)


@pytest.mark.parametrize(
    ("users", "sampled", "published"),
    [
        (1e5, 1e2, [0.97, 0.98, 1.00, 1.07, 1.18, 2.21]),
        (1e6, 1e1, [0.68, 0.69, 0.69, 0.69, 0.69, 0.72]),
        (1e6, 1e3, [1.17, 1.17, 1.20, 1.28, 1.39, 2.44]),
        (1e6, 1e4, [1.73, 1.92, 2.08, 3.06, 8.49, 32.38]),
    ],
)
def test_mcmahan_2018_table_1(users, sampled, published):
    found = [moments(sampled / users, 1.0, 10**power, users**-1.1) for power in range(6)]
    assert found == pytest.approx(published, abs=0.0051)


def test_mcmahan_2018_their_language_model():
    # 763,430 users, 5,000 a round, noise multiplier 1, 5,000 rounds: (4.634, 1e-9).
    assert moments(5000 / 763430, 1.0, 5000, 1e-9) == pytest.approx(4.634, abs=0.0005)


def test_both_bounds_are_those_of_the_library():
    mechanism = Mechanism(1.1, "poisson", 0.02, times=300)
    whole = dp.SelfComposedDpEvent(dp.PoissonSampledDpEvent(0.02, dp.GaussianDpEvent(1.1)), 300)
    by_rdp, by_pld = rdp.RdpAccountant(ORDERS), pld.PLDAccountant(value_discretization_interval=1e-3)
    for accountant in (by_rdp, by_pld):
        accountant.compose(whole)
    found = epsilons([mechanism], 1e-5)
    assert found.rdp == by_rdp.get_epsilon(1e-5) and found.pld == by_pld.get_epsilon(1e-5)
    assert found.best == found.pld < found.rdp


def test_gaussians_add_up_to_one_gaussian():
    # 1 / 3^2 + 1 / 4^2 = 1 / 2.4^2.
    assert epsilon([Mechanism(3.0), Mechanism(4.0)], 1e-5) == pytest.approx(epsilon([Mechanism(2.4)], 1e-5), rel=1e-6)
    # Dwork and Roth 2014, theorem A.1: sqrt(2 ln(1.25 / delta)) / epsilon is enough noise for epsilon below 1.
    enough = math.sqrt(2 * math.log(1.25 / 1e-5)) / 0.9
    assert epsilon([Mechanism(enough)], 1e-5) < 0.9


def test_laplace_noise_of_scale_one_over_epsilon_is_epsilon():
    assert epsilon([Mechanism(2.0, noise="laplace")], 1e-9) == pytest.approx(0.5, rel=0.01)


def test_to_replace_a_silo_is_to_move_the_sum_twice_as_far():
    """Of a fixed number in each round, with all of them drawn, the noise counts half."""
    fixed = epsilons([Mechanism(2.0, "fixed", size=10, of=10)], 1e-5)
    assert fixed.rdp == pytest.approx(epsilons([Mechanism(1.0)], 1e-5).rdp) and fixed.pld is None
    few, many = (epsilon([Mechanism(2.0, "fixed", size=n, of=1000, times=10)], 1e-5) for n in (1, 100))
    assert few < many < epsilon([Mechanism(1.0, times=10)], 1e-5)


def test_what_has_no_neighbours_in_common_is_not_added_up():
    with pytest.raises(FedllmError, match="use one of them throughout"):
        epsilon([Mechanism(1.0, "fixed", size=1, of=10), Mechanism(1.0, "poisson", 0.1)], 1e-5)


def test_without_noise_epsilon_is_infinite_and_without_a_look_zero():
    assert epsilon([Mechanism(1.0), Mechanism(0.0)], 1e-5) == math.inf
    assert epsilon([], 1e-5) == epsilon([Mechanism(1.0, "poisson", 0.0)], 1e-5) == 0.0
    with pytest.raises(FedllmError, match="delta is 1;"):
        epsilon([Mechanism(1.0)], 1)


@settings(max_examples=4, deadline=None)
@given(st.floats(0.3, 20), st.floats(0.05, 1), st.integers(1, 50), st.floats(1.01, 3))
def test_more_noise_fewer_rounds_or_rarer_sampling_never_cost_more(multiplier, rate, times, more):
    """By Renyi divergence alone, which has no grid of its own."""
    here = bounds((Mechanism(multiplier * 5, "poisson", rate, times=times),), 1e-5).rdp
    assert bounds((Mechanism(multiplier * 5 * more, "poisson", rate, times=times),), 1e-5).rdp <= here
    assert bounds((Mechanism(multiplier * 5, "poisson", rate, times=times + 5),), 1e-5).rdp >= here
    assert bounds((Mechanism(multiplier * 5, "poisson", rate / more, times=times),), 1e-5).rdp <= here
    assert bounds((Mechanism(multiplier * 5, times=times),), 1e-5).rdp >= here
    assert bounds((Mechanism(multiplier * 5, "poisson", rate, times=times),), 1e-6).rdp >= here


@pytest.mark.parametrize("target", [0.1, 1.0, 8.0, 50.0])
def test_the_noise_for_a_target_reaches_it_and_hardly_more(target):
    def uses(multiplier):
        return [Mechanism(multiplier, times=30)]

    noise = noise_for(target, 1e-5, uses)
    assert epsilon(uses(noise), 1e-5) <= target < epsilon(uses(noise * 0.999), 1e-5)


def test_a_target_that_no_noise_reaches_is_a_sentence():
    with pytest.raises(FedllmError, match=r"No noise reaches epsilon 1e-09"):
        noise_for(1e-9, 1e-12, lambda multiplier: [Mechanism(multiplier, times=10)])
