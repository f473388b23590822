"""LoRA averaged as products: by hand, in the step, at the rank's edge, and what it is not for."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.optimisers import fedadam, fedavg, fedavgm
from fedllm.core.round import averaging
from fedllm.core.types import Aside, Facts, Reply, Request, Silo, State, Work, on_meta
from fedllm.exchange.low_rank import factors
from fedllm.exchange.product import changed, product, products
from fedllm.runtime.local import local

A, B, BA = (f"q.lora_{which}.default.weight" for which in ("A", "B", "BA"))


def ends_at(ends):
    """A client that ends at factors of its own, with a weight."""

    def client(request, silo):
        end, weight = ends[request.client]
        return Reply(request.client, request.round, {n: v - end[n] for n, v in request.tensors.items()}, weight), {}

    return Work(client, lambda members: [client(*member) for member in members])


def run(start, ends, rounds=1, optimiser=None, aside=False):
    """Return the state after some rounds in which each silo ends where `ends` says, and the last report."""
    algorithm = averaging(
        work=ends_at(ends), select=lambda number: list(ends), aggregate=mean(), optimiser=optimiser, share=product()
    )
    inner = local(algorithm.client, lambda name: Silo(name, torch.nn.Module(), {}, {}, 0), {})

    def exchange(requests):
        for reply in inner(requests):
            held = reply.tensors
            yield reply._replace(tensors=Aside(on_meta(held), held.__getitem__)) if aside else reply

    state, report = algorithm.init(start), {}
    for _ in range(rounds):
        state, report = algorithm.server(state, exchange)
    return state, report


def adapter(draw, rank, outputs=5, inputs=7):
    return {
        A: torch.randn(rank, inputs, generator=draw),
        B: torch.randn(outputs, rank, generator=draw),
        "norm.weight": torch.randn(3, generator=draw),
    }


def drawn(rank, count=3, **sizes):
    draw = torch.Generator().manual_seed(rank)
    return adapter(draw, rank, **sizes), {
        name: (adapter(draw, rank, **sizes), float(weight)) for weight, name in enumerate("abc"[:count], 1)
    }


TWO = {
    "a": ({A: torch.tensor([[2.0, 0.0]]), B: torch.tensor([[1.0], [0.0]])}, 3.0),
    "b": ({A: torch.tensor([[0.0, 4.0]]), B: torch.tensor([[0.0], [1.0]])}, 1.0),
}
"""Products of 2 at the one corner and 4 at the other: by weight their mean has 1.5 and 1."""


def test_the_mean_of_two_products_by_hand():
    wide = {
        name: ({A: torch.cat([end[A], torch.zeros(1, 2)]), B: torch.cat([end[B], torch.zeros(2, 1)], 1)}, weight)
        for name, (end, weight) in TWO.items()
    }
    state, report = run({A: torch.eye(2), B: torch.zeros(2, 2)}, wide)
    torch.testing.assert_close(state.params[B] @ state.params[A], torch.diag(torch.tensor([1.5, 1.0])))
    assert state.params.keys() == {A, B} and report["truncation_error"] < 1e-6


def test_rank_one_keeps_the_larger_of_the_two_and_says_what_it_lost():
    # Eckart and Young: of diag(1.5, 1) the nearest of rank 1 is diag(1.5, 0), at a distance of 1.
    state, report = run({A: torch.tensor([[0.6, 0.8]]), B: torch.zeros(2, 1)}, TWO)
    torch.testing.assert_close(state.params[B] @ state.params[A], torch.tensor([[1.5, 0.0], [0.0, 0.0]]))
    assert report["truncation_error"] == pytest.approx(1 / 3.25**0.5, rel=1e-6)
    torch.testing.assert_close(state.params[A], torch.tensor([[1.0, 0.0]]))


@pytest.mark.parametrize("rank", [1, 3, 5, 9])
def test_one_silo_gets_its_own_product_back(rank):
    start, ends = drawn(rank, 1)
    state, report = run(start, ends)
    end, _ = ends["a"]
    torch.testing.assert_close(state.params[B] @ state.params[A], end[B] @ end[A], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state.params["norm.weight"], end["norm.weight"])
    assert report["truncation_error"] < 1e-5


@pytest.mark.parametrize("optimiser", [fedavg(0.5), fedavgm(0.7), fedadam()], ids=lambda each: each.name)
def test_the_servers_step_and_its_memory_are_of_products(optimiser):
    # With as many rows as the matrix has nothing is cut off, and the rounds are those of a dense matrix.
    start, ends = drawn(5)
    state, _ = run(start, ends, 3, optimiser)
    dense = products(start)
    memory = optimiser.init(dense)
    for _ in range(3):
        whole = sum(weight for _, weight in ends.values())
        each = [({n: v - products(end)[n] for n, v in dense.items()}, weight) for end, weight in ends.values()]
        gone = {name: sum(weight / whole * update[name] for update, weight in each) for name in dense}
        dense, memory = optimiser.step(dense, gone, memory)
    now = products(state.params)
    assert all(torch.allclose(now[name], dense[name], rtol=1e-4, atol=1e-4) for name in dense)
    assert state.optimiser.keys() == memory.keys()


def test_replies_outside_of_memory_come_to_the_same_bits_and_so_does_a_second_run():
    start, ends = drawn(2)
    one, other = run(start, ends, 3, fedadam()), run(start, ends, 3, fedadam(), aside=True)
    assert one[1] == other[1] == run(start, ends, 3, fedadam())[1]
    for left, right in zip(one[0][1:], other[0][1:], strict=True):
        assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_round_in_which_nobody_is_asked_leaves_the_factors_and_remembers_none():
    start, _ = drawn(2)
    state, report = run(start, {})
    assert all(state.params[name] is value for name, value in start.items())
    assert not state.transforms and "truncation_error" not in report


def test_the_change_of_a_product_is_that_of_its_factors_multiplied_out():
    start, ends = drawn(3, 1)
    end, _ = ends["a"]
    found = changed(start, {name: value - end[name] for name, value in start.items()})
    assert list(found) == [BA, "norm.weight"]
    torch.testing.assert_close(found[BA], start[B] @ start[A] - end[B] @ end[A], rtol=1e-5, atol=1e-5)


def test_many_clients_at_once_send_what_each_sends():
    start, ends = drawn(2)
    work = product().work(ends_at(ends))
    members = [(Request(name, 0, "train", start), Silo(name, torch.nn.Module(), {}, {}, 0)) for name in ends]
    for (reply, _), member in zip(work.cohort(members), members, strict=True):
        alone, _ = work.client(*member)
        assert all(torch.equal(alone.tensors[name], value) for name, value in reply.tensors.items())


def test_what_is_sent_down_is_factors_and_what_comes_up_is_dense():
    start, ends = drawn(1)
    algorithm = averaging(work=ends_at(ends), select=list, aggregate=mean(), share=product())
    like = on_meta(start)
    assert [sum(value.nbytes for value in found(like).values()) for found in (algorithm.down, algorithm.wire)] == [
        4 * (7 + 5 + 3),
        4 * (7 * 5 + 3),
    ]
    assert isinstance(algorithm.init(like), State)


shapes = st.tuples(st.integers(1, 60), st.integers(1, 60), st.integers(1, 6), st.integers(0, 2**31))


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_no_matrix_of_the_rank_is_nearer_and_the_rows_of_a_are_as_long_as_they_were(shape):
    outputs, inputs, rank, seed = shape
    draw = torch.Generator().manual_seed(seed)
    m = torch.randn(outputs, inputs, generator=draw)
    start = torch.randn(rank, inputs, generator=draw)
    a, b = factors(m, start)
    left = torch.linalg.svdvals(m.double())[rank:].norm()
    assert float((m - b @ a).norm()) <= 1.001 * float(left) + 1e-5 * float(m.norm())
    if rank <= inputs:
        lengths = start.norm().square() / rank
        torch.testing.assert_close(a @ a.mT, lengths * torch.eye(rank), rtol=1e-4, atol=1e-4 * float(lengths))


def test_a_stays_where_it_is_if_the_product_lies_in_its_rows():
    start = torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0]])
    m = torch.tensor([[1.0, 2.0, 0.0], [3.0, 4.0, 0.0], [5.0, 6.0, 0.0]])
    a, b = factors(m, start)
    torch.testing.assert_close(a, start)
    torch.testing.assert_close(b, torch.tensor([[1.0, 0.5], [2.0, 1.5], [3.0, 2.5]]))


@pytest.mark.parametrize("rank", [0, 1])
def test_where_the_product_has_fewer_directions_a_keeps_those_that_it_had(rank):
    start = torch.tensor([[0.0, 2.0, 0.0], [2.0, 0.0, 0.0]])
    m = rank * torch.tensor([[3.0, 0.0, 0.0], [1.0, 0.0, 0.0]])
    a, b = factors(m, start)
    torch.testing.assert_close(a, start)
    torch.testing.assert_close(b @ a, m)


@pytest.mark.parametrize(
    ("names", "sizes", "why"),
    [
        ([B], (4, 2), "A is frozen"),
        (["prompt.embedding"], (4, 2), "nothing that is trained is one"),
        ([A, B], (2, 2, 3, 3), "no factor of a linear layer"),
        ([A, B, "wte.lora_embedding_A.default"], (2, 2), "no factor of a linear layer"),
    ],
)
def test_what_makes_no_product_is_refused(names, sizes, why):
    with pytest.raises(FedllmError, match=why):
        product().up(0, {name: torch.zeros(sizes) for name in names})


def test_a_bound_on_factors_is_no_bound_on_products():
    work = Work(ends_at({}).client, claim=lambda facts: facts._replace(norm_bound=1.0))
    with pytest.raises(FedllmError, match="measured for factors"):
        product().work(work).claim(Facts())
