"""Two steps of every server optimiser, worked out by hand; g is the mean of start - end."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.optimisers import fedadagrad, fedadam, fedavg, fedavgm, fedyogi


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


EVERY = [fedavg(), fedavgm(), fedadagrad(), fedadam(), fedyogi()]


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
