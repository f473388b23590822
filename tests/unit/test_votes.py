"""Report noisy max: right without noise, as private as it says, and composed as the papers compose it."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.exchange.votes import epsilon_of_votes, laplace, require_epsilon, winner


def test_without_noise_the_most_votes_win_and_with_noise_mostly():
    assert winner([2, 5, 1]) == 1
    places = [winner([2, 12, 1], 1.0, generator(0, place)) for place in range(200)]
    assert places.count(1) > 190
    assert winner([2, 5], 0.5, generator(7)) == winner([2, 5], 0.5, generator(7))


def test_the_noise_is_laplace():
    draws = laplace(200_000, 2.0, generator(0)).sort().values
    for quantile in (0.1, 0.5, 0.9):
        exact = 2 * math.log(2 * quantile) if quantile < 0.5 else -2 * math.log(2 * (1 - quantile))
        assert draws[int(quantile * len(draws))].item() == pytest.approx(exact, abs=0.05)


def test_one_silos_vote_changes_the_odds_by_no_more_than_epsilon():
    epsilon, many = 0.7, 40_000
    noise = torch.stack([laplace(many, 1 / epsilon, generator(1, place)) for place in range(3)], 1)

    def odds(counts):
        return ((torch.tensor(counts) + noise).argmax(1)[:, None] == torch.arange(3)).double().mean(0)

    with_it, without = odds([3.0, 3.0, 1.0]), odds([3.0, 2.0, 1.0])
    ratio = (with_it / without).log().abs().max().item()
    assert 0.2 < ratio < epsilon + 0.05


def test_what_votes_spend_together():
    assert epsilon_of_votes(5, 0.2) == pytest.approx(1.0)
    assert epsilon_of_votes(1, 0.2, 1e-6) == pytest.approx(0.2)
    rho = 1000 * 0.01**2 / 2
    assert epsilon_of_votes(1000, 0.01, 1e-6) == pytest.approx(rho + 2 * math.sqrt(rho * math.log(1e6)))
    assert epsilon_of_votes(0, 1.0) == 0


@pytest.mark.parametrize("epsilon", [0, -1, math.inf, math.nan])
def test_an_epsilon_that_promises_nothing_is_refused(epsilon):
    with pytest.raises(FedllmError, match="epsilon"):
        require_epsilon(epsilon)
