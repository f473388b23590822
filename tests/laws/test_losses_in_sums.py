"""Held-out losses in a secure sum: their mean is right or is not told, and no one's own can be read from it."""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.types import Reply, Request, Work
from fedllm.exchange.looking import BEYOND, COUNT, LOSS, TOTAL, looking
from fedllm.exchange.secure.beside import LARGEST_LOSS, beside, loss_step, losses_in
from fedllm.exchange.secure.messages import TAIL, TRAIN
from fedllm.exchange.secure.settings import Settings
from tests.laws.test_secure_sum import PHASES, dropping, same
from tests.secure_sums import LIKE, Wire, names_of, silo_of


class Looking(Wire):
    """A wire whose silos tell a loss, if they have one."""

    losses: dict[str, float]

    def train(self, request, silo):
        reply, kept = super().train(request, silo)
        own = {LOSS: self.losses[silo.name]} if silo.name in self.losses else {}
        return reply._replace(scalars={**reply.scalars, **own}), kept


def looked(losses, *given, **more):
    wire = Looking(*given, **more)
    wire.losses = losses
    return wire


@settings(max_examples=20, deadline=None)
@given(
    st.lists(st.floats(0, LARGEST_LOSS), min_size=7, max_size=7),
    st.lists(st.sampled_from([0, 1, 2, 3, 9, 9, 9, 9]), min_size=7, max_size=7),
)
def test_the_mean_is_that_of_just_the_silos_in_the_sum_whoever_drops_out(losses, pattern):
    names = names_of(7)
    when = dict(zip(names, pattern, strict=True))
    wire = looked(dict(zip(names, losses, strict=True)), Settings(drop_outs=2), fault=dropping(when))
    reply = wire.round(names)
    if not reply.of:
        assert not reply.scalars and len([name for name in names if when[name] < len(PHASES)]) > 2
        return
    assert same(reply, [name for name in names if when[name] >= 3], wire)
    expected = sum(wire.losses[name] for name in reply.of)
    assert reply.scalars[COUNT] == len(reply.of) and reply.scalars[BEYOND] == 0
    assert abs(reply.scalars[TOTAL] - expected) <= len(reply.of) * loss_step(7) / 2 + 1e-9


def test_four_losses_by_hand():
    names = names_of(4)
    reply = looked(dict(zip(names, [2.0, 3.0, 5.0, 0.5], strict=True))).round(names)
    assert reply.scalars == {TOTAL: 10.5, COUNT: 4.0, BEYOND: 0.0}


def test_where_one_silo_has_no_loss_none_is_told_and_the_server_cannot_reckon_that_of_the_others():
    names, totals = names_of(4), set()
    for number in range(3):
        wire = looked({names[0]: 2.0})
        reply = wire.round(names, number)
        assert len(reply.of) == 4 and not reply.scalars
    for number in range(200):
        each = [beside(1, 0, 2.0, 4, b"")] + [beside(1, 0, None, 4, bytes([number, place] * 16)) for place in range(3)]
        totals.add(int(sum(each)[-1]) >> 24)
        assert losses_in(sum(each), 4) == {}
    # Of 256 equally likely places 200 draws leave out few more than they must: 139 are hit on average.
    assert len(totals) > 110


def test_a_loss_that_is_none_or_too_large_counts_as_the_largest_and_is_counted():
    names = names_of(5)
    odd = dict(zip(names, [1.0, math.nan, math.inf, 1e9, -3.0], strict=True))
    assert looked(odd).round(names).scalars == pytest.approx({TOTAL: 1 + 4 * LARGEST_LOSS, COUNT: 5.0, BEYOND: 4.0})


@pytest.mark.parametrize("silos", [3, 1024, 100_000])
def test_the_largest_losses_of_all_do_not_wrap(silos):
    whole = sum(int(beside(1, 0, LARGEST_LOSS, silos, b"")[-1]) for _ in range(3)) // 3 * silos
    assert whole < 2**32
    assert whole * loss_step(silos) == pytest.approx(silos * LARGEST_LOSS, rel=1e-4)


def test_what_a_silo_sends_does_not_show_its_loss():
    wire = looked(dict.fromkeys(names_of(3), 2.0))
    wire.round(names_of(3))
    plain = beside(1, 0, 2.0, 3, b"").view("int32").tolist()
    sent = [reply.tensors[TAIL].tolist() for request, reply in wire.seen if request.op == TRAIN]
    assert len(sent) == 3 and not any(one == other for tail in sent for one, other in zip(tail, plain, strict=True))
    assert not any(reply.scalars for _, reply in wire.seen)


def test_each_group_tells_the_losses_of_its_own():
    names = names_of(12)
    wire = looked({name: float(place) for place, name in enumerate(names)}, Settings(groups=3))
    replies = wire.rounds(names)
    assert sorted(reply.client for reply in replies) == ["sum 1", "sum 2", "sum 3"]
    for reply in replies:
        expected = sum(wire.losses[name] for name in reply.of)
        assert reply.scalars[TOTAL] == pytest.approx(expected, abs=1e-6) and reply.scalars[COUNT] == 4


def test_a_silo_looks_at_what_it_begins_with_every_so_many_rounds_alone_or_in_a_batch():
    asked = []

    def evaluator(request, silo):
        asked.append((request.op, request.round, request.client, request.tensors is LIKE))
        return Reply(silo.name, request.round, {}, 1.0, {} if silo.name == "s01" else {"loss": 2.5, "scored": 9.0}), {}

    def train(request, silo):
        return Reply(silo.name, request.round, dict(LIKE), 3.0, {"tokens": 7.0}), {"x": torch.ones(1)}

    work = looking(Work(train, lambda members: [train(*member) for member in members]), evaluator, 2)
    for number in (0, 1, 2):
        members = [(Request(name, number, "train", LIKE), silo_of(name, {})) for name in names_of(2)]
        alone, together = [work.client(*member) for member in members], work.cohort(members)
        assert alone == together and alone[0][1] == {"x": torch.ones(1)}
        told = [dict(reply.scalars) for reply, _ in alone]
        assert told == [{"tokens": 7.0, **({} if number == 1 else {LOSS: 2.5})}, {"tokens": 7.0}]
    assert asked == [("evaluate", number, name, True) for number in (0, 2) for _ in range(2) for name in names_of(2)]
