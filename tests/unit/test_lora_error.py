"""The error of averaging LoRA's factors apart: by hand, none where it is none, and through the sketch."""

from __future__ import annotations

import pytest
import torch

from fedllm.exchange.lora_error import COLUMNS, TOGETHER, lora_error

A, B = "q.lora_A.default.weight", "q.lora_B.default.weight"


def probed(start, ends, weights, how="examples"):
    """Run the probe over clients that end at `ends`; they send start - end."""
    probe = lora_error(how)
    look = probe.zero(start)
    for end, weight in zip(ends, weights, strict=True):
        look = probe.add(look, {name: start[name] - end[name] for name in start}, weight)
    return probe.done(look)["aggregation_error"]


def dense(ends, weights):
    """The definition, with every product held."""
    whole = sum(weights)
    off, size = 0.0, 0.0
    for a in [name for name in ends[0] if ".lora_A." in name]:
        b = a.replace("lora_A", "lora_B")
        mean = sum(w * end[b].double() @ end[a].double() for w, end in zip(weights, ends, strict=True)) / whole
        mean_a = sum(w * end[a].double() for w, end in zip(weights, ends, strict=True)) / whole
        mean_b = sum(w * end[b].double() for w, end in zip(weights, ends, strict=True)) / whole
        off += float((mean - mean_b @ mean_a).square().sum())
        size += float(mean.square().sum())
    return (off / size) ** 0.5


def adapter(draw, layers=("q", "v"), rank=4, inputs=12, outputs=9):
    return {
        f"{layer}.lora_{half}.default.weight": torch.randn(shape, generator=draw)
        for layer in layers
        for half, shape in (("A", (rank, inputs)), ("B", (outputs, rank)))
    }


def test_two_clients_of_rank_one_by_hand():
    # B A of the clients: 2 * [1, 0] = [2, 0] and 4 * [0, 3] = [0, 12]; weights 1 and 3 of 4.
    # Mean product [0.5, 9]. Means: B = 3.5, A = [0.25, 2.25], product [0.875, 7.875].
    # Difference [-0.375, 1.125]; the ratio is sqrt(1.40625 / 81.25).
    start = {A: torch.zeros(1, 2), B: torch.zeros(1, 1)}
    ends = [
        {A: torch.tensor([[1.0, 0.0]]), B: torch.tensor([[2.0]])},
        {A: torch.tensor([[0.0, 3.0]]), B: torch.tensor([[4.0]])},
    ]
    assert probed(start, ends, [1.0, 3.0]) == pytest.approx((1.40625 / 81.25) ** 0.5)
    # Uniform: mean product [1, 6]; means B = 3, A = [0.5, 1.5], product [1.5, 4.5]; difference [-0.5, 1.5].
    assert probed(start, ends, [1.0, 3.0], "uniform") == pytest.approx((2.5 / 37) ** 0.5)


@pytest.mark.parametrize("seed", range(4))
def test_it_is_the_dense_computation_over_all_layers_together(seed):
    draw = torch.Generator().manual_seed(seed)
    start, ends, weights = adapter(draw), [adapter(draw) for _ in range(5)], [1.0, 20.0, 3.0, 7.0, 0.5]
    assert probed(start, ends, weights) == pytest.approx(dense(ends, weights), rel=1e-5)
    assert probed(start, ends, weights, "uniform") == pytest.approx(dense(ends, [1.0] * 5), rel=1e-5)


@pytest.mark.parametrize("half", ["lora_A", "lora_B"])
def test_where_one_factor_is_the_same_for_all_there_is_no_error(half):
    draw = torch.Generator().manual_seed(0)
    start, ends = adapter(draw), [adapter(draw) for _ in range(3)]
    for end in ends:
        end.update({name: value for name, value in ends[0].items() if half in name})
    assert probed(start, ends, [1.0, 2.0, 3.0]) < 1e-6


def test_one_client_has_no_error_and_untouched_adapters_none():
    draw = torch.Generator().manual_seed(0)
    start = adapter(draw)
    assert probed(start, [adapter(draw)], [5.0]) < 1e-6
    untouched = {name: torch.zeros_like(value) if "lora_B" in name else value for name, value in start.items()}
    assert probed(untouched, [untouched, untouched], [1.0, 1.0]) == 0.0


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("clients", [TOGETHER, TOGETHER + 1, 2 * TOGETHER, 2 * TOGETHER + 5])
def test_rounds_of_many_clients_are_estimated_to_a_fifth_in_the_memory_of_a_few(seed, clients):
    draw = torch.Generator().manual_seed(seed)
    sizes = {"rank": 2, "inputs": 1100, "outputs": 40}
    # Adapters that have something in common, as those of one round do.
    start = adapter(draw, **sizes)
    ends = [
        {name: value + 0.5 * torch.randn(value.shape, generator=draw) for name, value in start.items()}
        for _ in range(clients)
    ]
    weights = [1.0 + number % 7 for number in range(clients)]
    expected = dense(ends, weights)
    assert 0.01 < expected < 1
    assert probed(start, ends, weights) == pytest.approx(expected, rel=1e-4 if clients <= TOGETHER else 0.2)
    probe = lora_error()
    look = probe.zero(start)
    for end in ends:
        look = probe.add(look, end, 1.0)
        assert len(look.waiting) <= TOGETHER
    assert all(group.sum_d_LON.shape[2] == COLUMNS + sizes["rank"] for group in look.groups)


def test_updates_are_not_changed():
    draw = torch.Generator().manual_seed(0)
    start, update = adapter(draw), adapter(draw)
    copies = [{name: value.clone() for name, value in each.items()} for each in (start, update)]
    probe = lora_error()
    look = probe.add(probe.add(probe.zero(start), update, 2.0), update, 3.0)
    probe.done(look)
    assert all(
        torch.equal(start[name], copies[0][name]) and torch.equal(update[name], copies[1][name]) for name in start
    )


def test_what_is_not_lora_beside_it_is_passed_over():
    draw = torch.Generator().manual_seed(0)
    start, ends = adapter(draw), [adapter(draw), adapter(draw)]
    with_more = [{**each, "score.weight": torch.ones(3)} for each in (start, *ends)]
    assert probed(with_more[0], with_more[1:], [1.0, 1.0]) == probed(start, ends, [1.0, 1.0])
