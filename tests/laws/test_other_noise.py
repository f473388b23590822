"""Noise at the silo, noise that takes turns, and a clip bound that follows: sensitivity, statistics, refusals."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.plan import plan
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Request, Silo, Work
from fedllm.exchange.adaptive_dp import adaptive_dp
from fedllm.exchange.banded_dp import banded_dp, coefficients, column_norm
from fedllm.exchange.local_dp import local_dp, nothing_else
from fedllm.exchange.quantise import quantise
from fedllm.exchange.select import cyclic
from fedllm.exchange.server_noise import Around, slack
from fedllm.exchange.top_k import top_k

SECRET = b"t" * 32
PARAMS = {"a": torch.zeros(40, 5), "b": torch.zeros(300)}


def flat(tensors):
    return torch.cat([value.flatten() for value in tensors.values()]).double()


def run(transform, updates, rounds=1, select=None, params=PARAMS):
    """The states after each round in which silos reply with these updates, which none of them clipped."""
    made = averaging(
        work=Work(None),
        select=select or (lambda number: list(updates)),
        aggregate=mean("uniform"),
        transforms=[transform],
    )
    states = [made.init(params)]
    for _ in range(rounds):
        replies = [Reply(n, states[-1].round, updates[n], 1.0) for n in made_asked(select, updates, states[-1])]
        states.append(made.server(states[-1], lambda requests, replies=replies: iter(replies))[0])
    return states


def made_asked(select, updates, state):
    return list(select(state.round)) if select else list(updates)


def drawn(count, size=1.0, like=PARAMS):
    draw = torch.Generator().manual_seed(0)
    return {
        f"s{place}": {name: size * torch.randn(value.shape, generator=draw) for name, value in like.items()}
        for place in range(count)
    }


# Noise that takes turns.


def matrix(weights, rounds):
    """C itself: banded, lower triangular, Toeplitz."""
    c = torch.zeros(rounds, rounds, dtype=torch.float64)
    for row, column in itertools.product(range(rounds), repeat=2):
        if 0 <= row - column < len(weights):
            c[row, column] = weights[row - column]
    return c


def test_the_coefficients_are_those_of_the_square_root_of_the_prefix_sums():
    root = matrix(coefficients(9), 9)
    assert torch.allclose(root @ root, torch.ones(9, 9, dtype=torch.float64).tril(), atol=1e-12)


@pytest.mark.parametrize(("apart", "bands", "rounds"), [(1, 1, 4), (2, 2, 6), (3, 3, 7), (3, 2, 8), (4, 4, 8)])
def test_the_sensitivity_is_that_of_the_turns_by_brute_force(apart, bands, rounds):
    """Every set of rounds at least `apart` from each other, every sign of what is added in them, of norm 1."""
    c, most = matrix(coefficients(bands), rounds), 0.0
    for size in range(1, rounds + 1):
        for turns in itertools.combinations(range(rounds), size):
            if any(later - sooner < apart for sooner, later in itertools.pairwise(turns)):
                continue
            for signs in itertools.product((1.0, -1.0), repeat=size):
                moved = torch.zeros(rounds, dtype=torch.float64)
                moved[list(turns)] = torch.tensor(signs, dtype=torch.float64)
                most = max(most, float((c @ moved).norm()) / math.sqrt(size))
    # What the ledger counts: `size` turns, each worth noise of the column norm over `noise` of it.
    assert most <= column_norm(coefficients(bands)) + 1e-9
    assert most == pytest.approx(column_norm(coefficients(bands)))


def test_the_noise_of_the_rounds_times_c_is_white():
    """z = C (what was added) has independent values with the standard deviation that the turns need."""
    bands, rounds, wide = 3, 9, {"w": torch.zeros(20_000)}
    names = [f"s{place}" for place in range(6)]
    still = {name: wide for name in names}
    around = Around(SECRET, 2.0, 3)
    states = run(banded_dp(around, 0.5, 2.0), still, rounds, cyclic(names, 3), wide)
    moved = torch.stack([before.params["w"] - after.params["w"] for before, after in itertools.pairwise(states)])
    z = matrix(coefficients(bands), rounds) @ moved.double()
    expected = 2.0 * 0.5 * column_norm(coefficients(bands)) * slack(2.0) / 2.0
    assert z.std(1).tolist() == pytest.approx([expected] * rounds, rel=0.03)
    apart = torch.corrcoef(z) - torch.eye(rounds, dtype=torch.float64)
    assert float(apart.abs().max()) < 5 / math.sqrt(20_000)
    # The sum of all rounds has less noise than fresh noise of the same worth would have left in it.
    fresh = 2.0 * 0.5 / 2.0 * math.sqrt(rounds)
    assert float(moved.double().sum(0).std()) < 0.9 * fresh


def test_a_banded_run_goes_on_from_its_state_with_the_same_bits():
    names, updates = [f"s{place}" for place in range(4)], drawn(4)
    whole = run(banded_dp(Around(SECRET, 2.0, 2), 0.5, 1.0), updates, 4, cyclic(names, 2))
    assert any(name.endswith("/1/a") for name in whole[2].transforms), whole[2].transforms.keys()
    again = run(banded_dp(Around(SECRET, 2.0, 2), 0.5, 1.0), updates, 4, cyclic(names, 2))
    assert torch.equal(flat(whole[-1].params), flat(again[-1].params))


def test_more_bands_than_rounds_between_turns_are_refused():
    with pytest.raises(FedllmError, match=r"bands is 3, and a silo takes part every 2 rounds"):
        banded_dp(Around(SECRET, 1.0, 2), 1.0, 1.0, bands=3)


def test_silos_that_take_turns_come_every_so_many_rounds():
    select = cyclic(list("abcdefg"), 3)
    assert [list(select(number)) for number in range(4)] == [["a", "d", "g"], ["b", "e"], ["c", "f"], ["a", "d", "g"]]


# A clip bound that follows.


def bound(state):
    return next(float(value) for name, value in state.transforms.items() if name.endswith("/norm"))


def test_the_bound_comes_to_the_quantile():
    """Updates of norms 1 to 20, in hardly any noise: a bound at their median."""
    updates = {
        f"s{place}": {name: place * value / flat(each).norm().float() for name, value in each.items()}
        for place, each in enumerate(drawn(20).values(), 1)
    }
    states = run(adaptive_dp(Around(SECRET, 20.0), 0.1, 1e-6, rate=0.6, count_noise=0.01), updates, 40)
    assert 9.5 < bound(states[-1]) < 11.5
    # By hand, in the first round none is within 0.1: the bound grows by exp(rate * quantile).
    assert bound(states[1]) == pytest.approx(0.1 * math.exp(0.6 * 0.5), rel=1e-2)


def test_both_noises_of_an_adaptive_round_are_worth_what_is_accounted_for():
    """z^-2 = z_updates^-2 + (2 sigma_b)^-2 (Andrew et al. 2021, theorem 1)."""
    wide, counted = {"w": torch.zeros(50_000)}, []
    still = {f"s{place}": wide for place in range(10)}
    noise, counting, expected = 1.5, 2.0, 10.0
    of_updates = (noise**-2 - (2 * counting) ** -2) ** -0.5
    for number in range(100):
        around = Around(bytes([number]) * 32, expected)
        state = run(adaptive_dp(around, 0.3, noise, count_noise=counting), still, params=wide)[-1]
        counted.append((-math.log(bound(state) / 0.3) / 0.2 + 0.5 - 0.5) * expected - 5)
    assert float(state.params["w"].std()) == pytest.approx(of_updates * 0.3 / expected, rel=0.02)
    spread = torch.tensor(counted)
    assert float(spread.std()) == pytest.approx(counting, rel=4 / math.sqrt(200))
    assert abs(float(spread.mean())) < 4 * counting / math.sqrt(100)


def test_no_silo_moves_an_adaptive_round_by_more_than_its_share():
    updates = drawn(5, 100.0)
    around = Around(SECRET, 5.0)
    whole = run(adaptive_dp(around, 0.4, 1e-9, count_noise=1e-6), updates)[-1]
    for left in updates:
        fewer = {name: update for name, update in updates.items() if name != left}
        rest = run(adaptive_dp(around, 0.4, 1e-9, count_noise=1e-6), fewer)[-1]
        assert float((flat(whole.params) - flat(rest.params)).norm()) <= 0.4 * slack(5.0) / 5.0
        # Its bit is one half either way.
        moved = abs(math.log(bound(whole) / bound(rest))) / 0.2 * 5.0
        assert moved == pytest.approx(0.5, abs=1e-4)


def test_a_count_that_would_tell_more_than_both_may_is_refused():
    with pytest.raises(FedllmError, match=r"count_noise is 0\.4, and with noise 1 it must be above 0\.5"):
        adaptive_dp(Around(SECRET, 10.0), 0.1, 1.0, count_noise=0.4)


# Noise at the silo.


def encoded(update, seed=1, secret=SECRET, **settings):
    return local_dp(secret, **{"max_norm": 0.5, "noise": 3.0, **settings}).encode(update, {}, seed)[0]


def test_what_leaves_a_silo_is_its_clipped_update_with_noise():
    update = {"w": torch.full((60_000,), 7.0)}
    noised = encoded(update)["w"].double()
    clipped = 0.5 / math.sqrt(60_000)
    assert float(noised.std()) == pytest.approx(3.0 * 0.5, rel=4 / math.sqrt(2 * 60_000) + 2e-3)
    assert abs(float(noised.mean()) - clipped) < 4 * 1.5 / math.sqrt(60_000)


def test_noise_at_a_silo_is_never_used_for_two_updates():
    update = {"w": torch.zeros(5_000)}
    one = encoded(update)["w"]
    assert torch.equal(one, encoded(update)["w"])
    near = encoded({"w": update["w"] + 1e-9})["w"]
    for other in (near, encoded(update, seed=2)["w"], encoded(update, secret=b"u" * 32)["w"]):
        assert abs(float(torch.corrcoef(torch.stack([one, other]))[0, 1])) < 0.1


def test_nothing_but_the_update_leaves():
    work = Work(lambda request, silo: (Reply("a", 0, {}, 30.0, {"train_loss": 2.0, "tokens": 9.0}), {}))
    reply, _ = nothing_else(work).client(Request("a", 0, "train", {}), Silo("a", None, {}, {}, 0))
    assert reply == Reply("a", 0, {}, 1.0, {})
    assert nothing_else(work).cohort is None


def planned(*transforms):
    made = averaging(work=Work(None), select=lambda n: ["a"], aggregate=mean("uniform"), transforms=transforms)
    return plan(made, PARAMS).steps[-1].facts


def test_codecs_go_around_noise_at_the_silo_and_a_second_noise_does_not():
    for chain in ([local_dp(SECRET, 1.0, 2.0), quantise(8)], [top_k(0.1), local_dp(SECRET, 1.0, 2.0)]):
        if chain[0].name.startswith("top"):
            # Its values and positions would both be noised: positions are whole numbers.
            with pytest.raises(FedllmError, match="float32"):
                planned(*chain)
        else:
            assert planned(*chain).noise == 2.0
    with pytest.raises(FedllmError, match="a second time"):
        planned(local_dp(SECRET, 1.0, 2.0), local_dp(SECRET, 1.0, 2.0))
