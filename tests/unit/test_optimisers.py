"""Two steps of every server optimiser, worked out by hand; g is the mean of start - end."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.optimisers import fedadagrad, fedadam, fedavg, fedavgm, fedyogi, nesterov, outer_momentum
from fedllm.core.schedule import Schedule, factor


def two_steps(optimiser, first, second, start=10.0):
    params = {"x": torch.tensor([start])}
    state = optimiser.init(params)
    after_one, state = optimiser.step(params, {"x": torch.tensor([first])}, state)
    after_two, state = optimiser.step(after_one, {"x": torch.tensor([second])}, state)
    return [after_one["x"].item(), after_two["x"].item()]


def test_fedavg_by_hand():
    # 10 - 2 = 8;  8 - 4 = 4.
    assert two_steps(fedavg(), 2.0, 4.0) == [8.0, 4.0]
    # 10 - 0.5 * 2 = 9;  9 - 0.5 * 4 = 7.
    assert two_steps(fedavg(0.5), 2.0, 4.0) == [9.0, 7.0]


def test_fedavgm_by_hand():
    # m = 0.5 * 0 + 2 = 2, 10 - 0.5 * 2 = 9;  m = 0.5 * 2 + 4 = 5, 9 - 0.5 * 5 = 6.5.
    assert two_steps(fedavgm(0.5, momentum=0.5), 2.0, 4.0) == [9.0, 6.5]


def test_fedadagrad_by_hand():
    # v = 3^2 + 4^2 = 25,     m = 4,   10 - 4 / (5 + 3) = 9.5;
    # v = 25 + 12^2 = 169,    m = 12,  9.5 - 12 / (13 + 3) = 8.75.
    assert two_steps(fedadagrad(1.0, beta1=0.0, tau=3.0), 4.0, 12.0) == [9.5, 8.75]
    # With beta1 = 0.5: m = 2, 10 - 2 / 8 = 9.75;  m = 1 + 6 = 7, 9.75 - 7 / 16 = 9.3125.
    assert two_steps(fedadagrad(1.0, beta1=0.5, tau=3.0), 4.0, 12.0) == [9.75, 9.3125]


def test_fedadam_by_hand():
    # v = 0.75 * 2^2 + 0.25 * 2^2 = 4,       m = 0.5 * 2 = 1,              10 - 1 / (2 + 2) = 9.75;
    # v = 0.75 * 4 + 0.25 * 5.5^2 = 3.25^2,  m = 0.5 * 1 - 0.5 * 5.5 = -2.25,  9.75 + 2.25 / (3.25 + 2).
    assert two_steps(fedadam(1.0, beta1=0.5, beta2=0.75, tau=2.0), 2.0, -5.5) == pytest.approx(
        [9.75, 9.75 + 2.25 / 5.25]
    )


def test_fedyogi_by_hand():
    # 3^2 > v = 2^2:    v = 4 + 0.25 * 9 = 2.5^2,       m = 0.5 * 3 = 1.5,                10 - 1.5 / (2.5 + 2);
    # 1.4^2 < v = 6.25: v = 6.25 - 0.25 * 1.96 = 2.4^2,  m = 0.5 * 1.5 + 0.5 * 1.4 = 1.45,  ... - 1.45 / (2.4 + 2).
    one = 10 - 1.5 / 4.5
    got = two_steps(fedyogi(1.0, beta1=0.5, beta2=0.75, tau=2.0), 3.0, 1.4)
    assert got == pytest.approx([one, one - 1.45 / 4.4])


def test_without_bias_correction_the_first_adam_step_is_small():
    # Corrected, the first step would be about the learning rate; here m = 0.1 g and v = 0.01 g^2 + 0.99 tau^2.
    (one, _) = two_steps(fedadam(1.0, beta1=0.9, beta2=0.99, tau=1e-3), 1.0, 0.0, start=0.0)
    assert one == pytest.approx(-0.1 / ((0.01 + 0.99e-6) ** 0.5 + 1e-3), rel=1e-5)


def test_fedavgm_is_sgd_with_momentum_on_the_pseudo_gradient():
    draw = torch.Generator().manual_seed(0)
    start = torch.randn(5, generator=draw)
    parameter = torch.nn.Parameter(start.clone())
    sgd = torch.optim.SGD([parameter], lr=0.3, momentum=0.9)
    optimiser = fedavgm(0.3, 0.9)
    params, state = {"x": start}, optimiser.init({"x": start})
    for _ in range(5):
        mean = torch.randn(5, generator=draw)
        parameter.grad = mean.clone()
        sgd.step()
        params, state = optimiser.step(params, {"x": mean}, state)
    torch.testing.assert_close(params["x"], parameter.detach())


def test_nesterov_by_hand():
    # m = 2,  10 - 0.5 * (2 + 0.5 * 2) = 8.5;  m = 0.5 * 2 + 4 = 5,  8.5 - 0.5 * (4 + 0.5 * 5) = 5.25.
    assert two_steps(nesterov(0.5, momentum=0.5), 2.0, 4.0) == [8.5, 5.25]
    # Without momentum it is FedAvg.
    assert two_steps(nesterov(0.5, momentum=0.0), 2.0, 4.0) == two_steps(fedavg(0.5), 2.0, 4.0)


def against_torch(optimiser, rates, momentum, steps=8):
    """Both take the same steps from the same start; yield both results after each."""
    draw = torch.Generator().manual_seed(0)
    params = {"x": torch.randn(5, 3, generator=draw), "y": torch.randn(7, generator=draw)}
    theirs = {name: torch.nn.Parameter(value.clone()) for name, value in params.items()}
    sgd = torch.optim.SGD(theirs.values(), lr=1.0, momentum=momentum, nesterov=True)
    state = optimiser.init(params)
    for number in range(steps):
        mean = {name: torch.randn(value.shape, generator=draw) for name, value in params.items()}
        for name, value in mean.items():
            theirs[name].grad = value.clone()
        sgd.param_groups[0]["lr"] = rates(number)
        sgd.step()
        params, state = optimiser.step(params, mean, state)
        yield params, {name: value.detach() for name, value in theirs.items()}


@pytest.mark.parametrize(("rate", "momentum"), [(0.7, 0.9), (1.0, 0.5), (0.3, 0.99)])
def test_nesterov_is_torchs_own_to_the_bit(rate, momentum):
    for ours, theirs in against_torch(nesterov(rate, momentum), lambda number: rate, momentum):
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_nesterovs_learning_rate_follows_its_schedule_over_the_rounds():
    optimiser = nesterov(0.8, 0.9, warmup=2, schedule="linear", floor=0.5, rounds=6)
    rates = [0.4, 0.8, 0.8, 0.7, 0.6, 0.5, 0.4, 0.4]
    for ours, theirs in against_torch(optimiser, lambda number: rates[number], 0.9):
        for name in ours:
            torch.testing.assert_close(ours[name], theirs[name])


def test_momentum_is_each_fragments_own():
    # x is seen in rounds 0 and 2, y in round 1: neither feels the other, nor the rounds between.
    optimiser = nesterov(0.5, 0.5)
    params = {"x": torch.tensor([10.0]), "y": torch.tensor([10.0])}
    state = optimiser.init(params)
    for mean in ({"x": 2.0}, {"y": 8.0}, {"x": 4.0}):
        params, state = optimiser.step(params, {name: torch.tensor([value]) for name, value in mean.items()}, state)
    assert [params["x"].item()] == two_steps(nesterov(0.5, 0.5), 2.0, 4.0)[1:]
    assert params["y"].item() == 10 - 0.5 * (8 + 4)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"learning_rate": 0.0}, "optimiser.learning_rate is 0"),
        ({"momentum": 1.0}, "optimiser.momentum is 1"),
        ({"warmup": -1}, "optimiser.warmup is -1"),
        ({"warmup": 2.5}, "optimiser.warmup is 2.5"),
        ({"floor": 2.0}, "optimiser.floor is 2"),
        ({"schedule": "cosine"}, "optimiser.rounds is missing"),
        ({"warmup": 0.1}, "optimiser.rounds is missing"),
    ],
)
def test_settings_of_nesterov_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(FedllmError, match=reason):
        nesterov(**settings)


@pytest.mark.parametrize("warmup", [0, 3])
def test_the_schedules_after_their_warm_up_are_those_of_transformers(warmup):
    from transformers import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup

    total, ways = 10, {"linear": get_linear_schedule_with_warmup, "cosine": get_cosine_schedule_with_warmup}
    for shape, theirs in ways.items():
        known = theirs(torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], 1.0), warmup, total).lr_lambdas[0]
        ours = [factor(Schedule(shape, warmup), step, total) for step in range(total + 3)]
        assert ours[warmup : total + 1] == pytest.approx([known(step) for step in range(warmup, total + 1)])
        assert ours[total:] == pytest.approx([0.0] * 3)
        # Theirs begins with a step that changes nothing; ours has the whole rate one step earlier.
        assert ours[:warmup] == pytest.approx([(step + 1) / warmup for step in range(warmup)])


def test_a_warm_up_below_one_is_a_share_of_the_run():
    for step in range(20):
        assert factor(Schedule("cosine", 0.2, 0.1), step, 20) == factor(Schedule("cosine", 4, 0.1), step, 20)
    assert [factor(Schedule(warmup=4), step, 0) for step in (0, 1, 3, 4, 400)] == [0.25, 0.5, 1.0, 1.0, 1.0]


EVERY = [fedavg(), fedavgm(), nesterov(), fedadagrad(), fedadam(), fedyogi()]


@pytest.mark.parametrize("optimiser", EVERY, ids=lambda optimiser: optimiser.name)
def test_a_partial_mean_leaves_the_other_names_and_their_state(optimiser):
    params = {"x": torch.tensor([1.0]), "y": torch.tensor([2.0])}
    state = optimiser.init(params)
    after, kept = optimiser.step(params, {"x": torch.tensor([1.0])}, state)
    assert after["x"] < 1.0 and after["y"] is params["y"]
    assert kept.keys() == state.keys()
    assert all(kept[name] is state[name] for name in state if name.endswith("y"))
    assert all(not torch.equal(kept[name], state[name]) for name in state if name.endswith("x"))


@pytest.mark.parametrize("optimiser", EVERY, ids=lambda optimiser: optimiser.name)
def test_a_step_changes_none_of_its_inputs(optimiser):
    params, mean = {"x": torch.tensor([1.0])}, {"x": torch.tensor([3.0])}
    state = optimiser.init(params)
    before = {name: value.clone() for name, value in state.items()}
    optimiser.step(params, mean, state)
    assert params["x"].item() == 1.0 and mean["x"].item() == 3.0
    assert all(torch.equal(state[name], before[name]) for name in state)


def test_nesterovs_defaults_follow_from_the_runs_length():
    # DiLoCo's values where nothing is known of the run, or it is long.
    assert nesterov().name == nesterov(0.7, 0.9).name == nesterov(rounds=3000).name
    assert nesterov(rounds=96).name == nesterov(rounds=750).name == "Nesterov(lr 1, momentum 0.6)"
    # Half way from 54 to 96; and 1 - 300 / 1500 = 0.8, whose rate is 0.7 + 0.9 - 0.8.
    assert nesterov(rounds=75).name == "Nesterov(lr 1, momentum 0.3)"
    assert nesterov(rounds=1500).name == "Nesterov(lr 0.8, momentum 0.8)"
    # What the recipe says is left as it is.
    assert nesterov(1.0, 0.9, rounds=600).name == "Nesterov(lr 1, momentum 0.9)"
    assert nesterov(momentum=0.9, rounds=10).name == "Nesterov(lr 0.7, momentum 0.9)"
    assert outer_momentum(54) == outer_momentum(1) == 0.0


def test_a_momentum_that_follows_from_the_runs_length_comes_with_a_rate_that_rises_over_a_tenth_of_it():
    given = nesterov(1.0, 0.6, warmup=0.1, rounds=100)
    assert two_steps(nesterov(rounds=100), 2.0, 4.0) == two_steps(given, 2.0, 4.0)
    assert two_steps(nesterov(1.0, 0.6, rounds=100), 2.0, 4.0) != two_steps(given, 2.0, 4.0)


def test_a_short_runs_default_is_plain_averaging():
    assert two_steps(nesterov(rounds=4), 2.0, 4.0) == two_steps(fedavg(), 2.0, 4.0)


@pytest.mark.parametrize("optimiser", EVERY, ids=lambda optimiser: optimiser.name)
def test_one_part_after_the_other_comes_to_the_same_bits(optimiser):
    draw = torch.Generator().manual_seed(0)
    params, change = ({"x": torch.randn(203, generator=draw)} for _ in range(2))
    memory = optimiser.init(params)
    for _ in range(2):
        moved, after = optimiser.step(params, change, memory)
        for start in range(0, 203, 7):
            part = slice(start, start + 7)
            held = {key: value[part] if value.dim() else value for key, value in memory.items()}
            own, kept = optimiser.step({"x": params["x"][part]}, {"x": change["x"][part]}, held)
            assert torch.equal(own["x"], moved["x"][part])
            assert all(
                torch.equal(value, after[key][part] if value.dim() else after[key]) for key, value in kept.items()
            )
        params, memory = moved, after
