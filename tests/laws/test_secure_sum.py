"""Secure aggregation: the sum of masked updates is the plain sum, whoever drops out when, or it is not told."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.round import averaging
from fedllm.core.types import Middleware, Reply, Work
from fedllm.exchange.clip import clip
from fedllm.exchange.secure.messages import KEYS, PART, SHARES, SUM, TAIL, TRAIN
from fedllm.exchange.secure.middleware import secure_sum
from fedllm.exchange.secure.server import TOO_LATE
from fedllm.exchange.secure.settings import Settings, circle
from fedllm.runtime.local import local
from tests.secure_sums import LIKE, SECRET, Wire, names_of, plain_mean, silo_of

PHASES = (KEYS, SHARES, TRAIN, SUM)


def same(reply, members, wire, number=0):
    """The reply is the plain mean of just these, bit for bit."""
    expected = plain_mean(members, wire.step, number)
    assert list(reply.of) == sorted(members)
    return all(torch.equal(reply.tensors[name], expected[name]) for name in LIKE)


@pytest.mark.parametrize("bits", [16, 32])
@pytest.mark.parametrize(("count", "neighbours"), [(3, 0), (4, 0), (7, 0), (14, 8)])
def test_the_masked_sum_is_the_plain_sum_exactly(count, neighbours, bits):
    wire = Wire(Settings(neighbours=neighbours, bits=bits))
    for number in (0, 1):
        assert same(wire.round(names_of(count), number), names_of(count), wire, number)


def dropping(when):
    """Each silo's replies stop at a phase."""

    def fault(op, replies):
        return [reply for reply in replies if when.get(reply.client, 9) > PHASES.index(op)]

    return fault


@settings(max_examples=20, deadline=None)
@given(st.lists(st.sampled_from([0, 1, 2, 3, 9, 9, 9, 9]), min_size=7, max_size=7), st.booleans())
def test_whoever_drops_out_when_the_sum_is_right_or_not_told(pattern, sparse):
    names = names_of(12 if sparse else 7)
    when = dict(zip(names, pattern, strict=False))
    wire = Wire(Settings(neighbours=8 if sparse else 0, drop_outs=2), fault=dropping(when))
    reply = wire.round(names)
    lost = [name for name in names if when.get(name, 9) < 3]
    if reply.of:
        assert same(reply, [name for name in names if name not in lost], wire)
        assert set(reply.lost) == set(lost)
    else:
        assert set(reply.lost) == set(names) and not reply.tensors
        assert len([name for name in names if when.get(name, 9) < 9]) > 2


@pytest.mark.parametrize("phase", range(3))
def test_as_many_as_is_stated_may_be_lost_at_every_phase_and_one_more_may_not(phase):
    names = names_of(10)
    for lost in (3, 4):
        wire = Wire(Settings(neighbours=8, drop_outs=3), fault=dropping({name: phase for name in names[:lost]}))
        reply = wire.round(names)
        assert list(reply.of) == (names[3:] if lost == 3 else [])
        assert reply.lost.keys() == set(names[:3] if lost == 3 else names)
    assert "4 are lost already" in reply.lost[names[9]] if phase == 0 else "7 are needed" in reply.lost[names[9]]


def test_who_does_not_help_to_unmask_is_in_the_sum_all_the_same():
    names = names_of(6)
    wire = Wire(Settings(drop_outs=2), fault=dropping({names[0]: 3, names[1]: 3}))
    reply = wire.round(names)
    assert same(reply, names, wire) and not reply.lost


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_replayed_reordered_duplicated_and_forged_messages_change_nothing(seed):
    chance, names, before = random.Random(seed), names_of(5), []

    def fault(op, replies):
        # All that was ever sent comes again, first or last, also in others' names.
        old = [reply._replace(client=chance.choice([*names, "mallory", reply.client])) for reply in before]
        forged = [Reply("mallory", 0, reply.tensors, 1.0) for reply in replies]
        first, rest = list(replies), [*old, *replies, *forged]
        before.extend(replies)
        chance.shuffle(first)
        chance.shuffle(rest)
        return [*first, *rest]

    wire = Wire(fault=fault)
    for number in (0, 1):
        assert same(wire.round(names, number), names, wire, number)


@settings(max_examples=10, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_messages_of_one_silo_that_are_mangled_never_make_a_wrong_sum(seed):
    chance, names = random.Random(seed), names_of(6)
    op, victim = chance.choice(PHASES), chance.choice(names)

    def mangled(value):
        spoilt = value.clone()
        flat = spoilt.view(-1)
        flat[chance.randrange(flat.numel())] += chance.choice([1, 2, 77])
        return chance.choice([spoilt, spoilt, value[:0], value.float(), torch.zeros_like(value)])

    def fault(now, replies):
        return [
            reply._replace(tensors={key: mangled(value) for key, value in reply.tensors.items()})
            if now == op and reply.client == victim
            else reply
            for reply in replies
        ]

    wire = Wire(Settings(drop_outs=1), fault=fault)
    reply = wire.round(names)
    others = [name for name in names if name != victim]
    if op == TRAIN and victim in reply.of:
        # What a silo adds of its own is its own to say; the count of silos is not.
        assert list(reply.of) == names
    elif reply.of:
        assert same(reply, names if victim in reply.of else others, wire)
    else:
        assert set(reply.lost) == set(names)


def test_a_late_silo_is_told_apart_from_a_lost_one():
    names, held = names_of(6), []

    def fault(op, replies):
        if op == TRAIN:
            held.append(replies[1])
            return [*replies[:1], *replies[3:]]
        return [*held, *replies] if op == SUM else replies

    wire = Wire(Settings(drop_outs=2), fault=fault)
    reply = wire.round(names)
    assert same(reply, [names[0], *names[3:]], wire)
    assert reply.lost == {names[1]: TOO_LATE, names[2]: "its masked update did not come"}


def test_shares_of_the_wrong_silo_are_found_out():
    names = names_of(7)

    def swapped(op, replies):
        if op != SUM:
            return replies
        return [replies[0]._replace(client=names[1]), replies[1]._replace(client=names[0]), *replies[2:]]

    wire = Wire(Settings(drop_outs=2), fault=swapped)
    assert same(wire.round(names), names, wire)


@pytest.mark.parametrize("forgers", [3, 4])
def test_forged_shares_are_borne_as_long_as_enough_others_are_true(forgers):
    names = names_of(7)

    def fault(op, replies):
        spoilt = [{key: value + 1 for key, value in reply.tensors.items()} for reply in replies[:forgers]]
        new = [reply._replace(tensors=each) for reply, each in zip(replies, spoilt, strict=False)]
        return [*new, *replies[forgers:]] if op == SUM else replies

    wire = Wire(Settings(drop_outs=2), fault=fault)
    assert circle(Settings(drop_outs=2), 7, 7).threshold == 4
    reply = wire.round(names)
    if forgers == 3:
        assert same(reply, names, wire)
    else:
        assert not reply.of and "one was forged" in reply.lost[names[0]]


def test_a_weight_of_a_thousand_million_counts_as_the_largest_that_is_stated():
    weights = {"s00": 1e9, "s01": 30.0, "s02": 5.4, "s03": 0.2}
    exact = {"s00": 64, "s01": 30, "s02": 5, "s03": 1}
    wire = Wire(Settings(largest_weight=64), weight=weights.__getitem__, weighted=True)
    reply = wire.round(list(weights))
    expected = plain_mean(list(weights), wire.step, weight=exact.__getitem__)
    assert reply.weight == 100.0
    for name, value in expected.items():
        # Rounding by chance moves each of four values by less than a step, of a sum that weighs 100 / 64.
        assert float((reply.tensors[name] - value).abs().max()) <= 4 * wire.step * 64 / 100


@pytest.mark.parametrize("point", [bytes(32), bytes([1, *[0] * 31]), bytes([0xEC, *[0xFF] * 30, 0x7F])])
def test_a_public_key_on_a_bad_point_puts_out_its_silo(point):
    names = names_of(6)

    def fault(op, replies):
        if op != KEYS:
            return replies
        channel, _ = replies[2].tensors[f"{PART}/keys"]
        bad = torch.stack([channel, torch.tensor(list(point), dtype=torch.uint8)])
        return [*replies[:2], replies[2]._replace(tensors={f"{PART}/keys": bad}), *replies[3:]]

    wire = Wire(Settings(drop_outs=2), fault=fault)
    # The silo itself does not notice, and is not asked again.
    reply = wire.round(names)
    assert same(reply, [name for name in names if name != names[2]], wire)
    assert "bad point" in reply.lost[names[2]]


def test_a_silo_that_copies_anothers_keys_is_put_out():
    names = names_of(5)

    def fault(op, replies):
        return [*replies[:1], replies[1]._replace(tensors=replies[0].tensors), *replies[2:]] if op == KEYS else replies

    wire = Wire(fault=fault)
    reply = wire.round(names)
    assert same(reply, [names[0], *names[2:]], wire) and "another silo's" in reply.lost[names[1]]


def test_one_silo_that_counts_as_many_spoils_the_round_and_not_the_sum():
    def fault(op, replies):
        if op != TRAIN:
            return replies
        tail = replies[0].tensors[TAIL] + torch.tensor([2, 0, 0, 0, 0, 0], dtype=torch.int32)
        return [replies[0]._replace(tensors={**replies[0].tensors, TAIL: tail}), *replies[1:]]

    reply = Wire(fault=fault).round(names_of(5))
    assert not reply.of and "it is of 5" in reply.lost["s00"]


def test_values_beyond_the_largest_are_brought_down_to_it_and_do_not_wrap():
    class Large(Wire):
        def train(self, request, silo):
            return Reply(silo.name, request.round, {key: torch.full_like(v, 9.0) for key, v in LIKE.items()}, 1.0), {}

    for bits in (16, 32):
        reply = Large(Settings(bits=bits)).round(names_of(5))
        assert all(bool(((value - 1.0).abs() < 1e-3).all()) for value in reply.tensors.values())


def algorithm(layers, transforms=()):
    def client(request, silo):
        update = {key: torch.randn(value.shape) for key, value in LIKE.items()}
        return Reply(silo.name, request.round, update, 3.0, {"loss": 1.0}), {}

    parts = {"aggregate": mean("uniform"), "transforms": transforms, "middleware": layers}
    return averaging(work=Work(client), select=lambda number: names_of(5), **parts)


def test_a_round_reports_who_is_in_the_sum_and_goes_on_without_one():
    quiet = set()

    def layer(exchange):
        return lambda requests: (r for r in exchange(requests) if not (r.client in quiet and TAIL in r.tensors))

    secure = secure_sum(Settings(drop_outs=1), SECRET, 1.0, lambda number: LIKE, weighted=False)
    made, memory = algorithm([secure, Middleware("quiet", layer)], [clip(1.0)]), {}
    state, exchange = made.init(LIKE), local(made.client, lambda name: silo_of(name, {}), memory)
    state, report = made.server(state, exchange)
    assert report == {"clients": 5, "asked": 5}
    quiet |= {"s01"}
    state, report = made.server(state, exchange)
    assert report == {"clients": 4, "asked": 5, "dropped.s01": "its masked update did not come"}
    quiet |= {"s02"}
    before = state.params
    state, report = made.server(state, exchange)
    assert (report["clients"], state.round) == (0, 3) and state.params == before
    assert report["dropped.s04"] == "no sum: 3 of 5 silos are left and 4 are needed"


def test_a_batch_of_clients_masks_as_each_does_alone():
    wire = Wire(Settings())
    names = names_of(4)
    wire.round(names)
    requests = [request for request, _ in wire.seen if request.op == TRAIN]
    replies = [reply for request, reply in wire.seen if request.op == TRAIN]

    def together(members):
        return [wire.train(*member) for member in members]

    batch = wire.layer.cohort(together)
    answers = batch([(request, silo_of(request.client, {})) for request in requests])
    for (reply, memory), alone in zip(answers, replies, strict=True):
        assert all(torch.equal(value, alone.tensors[name]) for name, value in reply.tensors.items())
        assert "work/x" in memory and f"{PART}/answered.{TRAIN}" in memory
    keys = [request._replace(op=KEYS, tensors={}) for request in requests]
    assert all(f"{PART}/keys" in reply.tensors for reply, _ in batch([(r, silo_of(r.client, {})) for r in keys]))


def test_no_silo_can_say_that_its_reply_is_a_sum():
    def layer(exchange):
        return lambda requests: (r._replace(of=["s00", "s00"]) for r in exchange(requests) if r.client == "s00")

    made = algorithm([Middleware("liar", layer)])
    _, report = made.server(made.init(LIKE), local(made.client, lambda name: silo_of(name, {}), {}))
    assert report["clients"] == 1


@pytest.mark.parametrize("bound", [None, float("inf")])
def test_without_a_bound_there_is_no_range_and_no_plan(bound):
    with pytest.raises(FedllmError, match="add \\[\\[transforms\\]\\] name = 'clip'"):
        secure_sum(Settings(), SECRET, bound, lambda number: LIKE)


class GoneError(Exception):
    """The server was killed."""


@pytest.mark.parametrize("phase", range(4))
def test_a_server_that_begins_a_round_again_gets_the_same_messages_or_none(phase):
    names, killed = names_of(5), [False]

    def fault(op, replies):
        if op == PHASES[phase] and not killed[0]:
            killed[0] = True
            raise GoneError
        return replies

    wire = Wire(Settings(drop_outs=1), fault=fault)
    with pytest.raises(GoneError):
        wire.round(names)
    reply = wire.round(names)
    if PHASES[phase] in (KEYS, SHARES):
        assert same(reply, names, wire)
    else:
        # A masked update leaves once: what was sent before is at the desk of a site, and here at nobody's.
        assert not reply.of and "answered once" in reply.lost[names[0]]
    sent = {}
    for request, said in wire.seen:
        value = b"".join(each.numpy().tobytes() for _, each in sorted(said.tensors.items()))
        assert sent.setdefault((request.op, request.client), value) == value
    assert same(wire.round(names, 1), names, wire, 1)


def test_a_round_that_is_begun_again_with_other_silos_is_refused_by_those_that_answered():
    names = names_of(6)

    def fault(op, replies):
        if op == SHARES and len(replies) == 5:
            raise GoneError
        return replies

    wire = Wire(Settings(drop_outs=1), fault=fault)
    with pytest.raises(GoneError):
        wire.round(names[:5])
    reply = wire.round(names)
    assert not reply.of and "answered once" in reply.lost[names[0]]
    assert not [request for request, _ in wire.seen if request.op == TRAIN]
