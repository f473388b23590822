"""Secure sums of groups: each is exact for its own silos, and rules that compare them bear what a mean does not."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.plan import plan
from fedllm.core.round import averaging
from fedllm.core.types import Middleware, Reply, Work
from fedllm.exchange.clip import clip
from fedllm.exchange.median import median
from fedllm.exchange.secure.graph import dealt
from fedllm.exchange.secure.messages import TAIL, TRAIN
from fedllm.exchange.secure.middleware import secure_sum
from fedllm.exchange.secure.settings import Settings, SumNoise
from fedllm.exchange.trimmed_mean import trimmed_mean
from fedllm.runtime.local import local
from tests.secure_sums import LIKE, SECRET, Wire, names_of, plain_mean, silo_of

NAMES = names_of(12)


def test_every_silo_is_in_one_group_and_the_groups_are_others_in_each_round():
    deals = [dealt(NAMES, 5, 7, number) for number in range(30)]
    assert all(sorted(name for group in each for name in group) == NAMES for each in deals)
    assert all(sorted(map(len, each)) == [2, 2, 2, 3, 3] for each in deals)
    assert len({str(each) for each in deals}) == 30 and deals[3] == dealt(NAMES, 5, 7, 3)


@pytest.mark.parametrize("bits", [16, 32])
def test_each_groups_sum_is_that_of_its_silos_exactly(bits):
    wire = Wire(Settings(groups=3, bits=bits))
    for number in (0, 1):
        replies = wire.rounds(NAMES, number)
        assert sorted(list(reply.of) for reply in replies) == sorted(dealt(NAMES, 3, 0, number))
        for reply in replies:
            expected = plain_mean(reply.of, wire.step, number)
            assert all(torch.equal(reply.tensors[name], expected[name]) for name in LIKE)


def test_all_groups_go_through_a_phase_together():
    wire, phases = Wire(Settings(groups=3)), []
    wire.fault = lambda op, replies: phases.append((op, len(replies))) or replies
    wire.rounds(NAMES)
    assert [count for _, count in phases] == [12] * 4


def test_a_group_that_loses_too_many_is_lost_alone():
    groups = dealt(NAMES, 3, 0, 0)
    gone = [groups[0][0], groups[1][1], groups[1][2]]

    def fault(op, replies):
        return [reply for reply in replies if op != TRAIN or reply.client not in gone]

    replies = {
        tuple(reply.of): reply.lost for reply in Wire(Settings(groups=3, drop_outs=1), fault=fault).rounds(NAMES)
    }
    assert replies[tuple(groups[2])] == {}
    assert replies[tuple(groups[0][1:])] == {gone[0]: "its masked update did not come"}
    assert replies[()].keys() == set(groups[1]) and "2 of 4 silos are left" in replies[()][groups[1][0]]


def algorithm(rule, groups, liar=None):
    """Silos whose updates are all about one; one of them may send as much as the clip lets it, the other way."""

    def client(request, silo):
        draw = torch.Generator().manual_seed(silo.seed)
        update = {key: 1 + 0.01 * torch.randn(value.shape, generator=draw) for key, value in LIKE.items()}
        update = {key: -1000 * value for key, value in update.items()} if silo.name == liar else update
        return Reply(silo.name, request.round, update, 1.0), {}

    layers = [secure_sum(Settings(groups=groups), SECRET, 100.0, lambda number: LIKE, weighted=False)] if groups else []
    parts = {"aggregate": rule, "transforms": [clip(100.0)], "middleware": layers}
    return averaging(work=Work(client), select=lambda number: NAMES, **parts)


def moved(made):
    state, report = made.server(made.init(LIKE), local(made.client, lambda name: silo_of(name, {}), {}))
    assert report["clients"] == 12
    return torch.cat([-value.flatten() for value in state.params.values()])


@pytest.mark.parametrize("rule", [median(), trimmed_mean(0.3)], ids=lambda rule: rule.name)
@pytest.mark.parametrize("groups", [0, 3], ids=["each", "groups"])
def test_one_silo_that_sends_anything_hardly_moves_what_compares_and_moves_a_mean(rule, groups):
    assert float((moved(algorithm(rule, groups, "s04")) - 1).abs().max()) < 0.05
    assert float(moved(algorithm(mean("uniform"), min(groups, 1), "s04")).mean()) < -0.5


def test_with_honest_silos_alone_the_rules_agree():
    for rule in (median(), trimmed_mean()):
        assert float((moved(algorithm(rule, 4)) - moved(algorithm(mean("uniform"), 0))).abs().max()) < 0.02


REFUSED = {
    "a median of one sum": (median(), 1, "set secure.groups to 3 or more"),
    "a trimmed mean of one sum": (trimmed_mean(), 1, "set secure.groups to 3 or more"),
    "a mean of groups": (mean(), 3, "set secure.groups = 1"),
}


@pytest.mark.parametrize(("rule", "groups", "remedy"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_the_remedy(rule, groups, remedy):
    with pytest.raises(FedllmError, match=remedy):
        plan(algorithm(rule, groups), LIKE)


def test_the_plan_says_what_the_server_sees():
    assert plan(algorithm(median(), 3), LIKE).steps[-1].facts.sees == "groups"


def test_noise_of_all_silos_together_does_not_go_with_groups():
    with pytest.raises(FedllmError, match=r"set secure.groups = 1"):
        secure_sum(Settings(groups=3), SECRET, 1.0, lambda n: LIKE, weighted=False, noise=SumNoise(1.0, 1.0))


def test_a_silo_tells_nothing_of_a_group_that_is_smaller_than_its_settings_say():
    wire = Wire(Settings(groups=4, least=4))
    assert all("secure.least is 4" in reply.lost[name] for reply in wire.rounds(NAMES) for name in reply.lost)


def test_what_comes_late_is_told_to_its_own_group():
    held = []

    def layer(exchange):
        def late(requests):
            for reply in exchange(requests):
                if requests[0].op == TRAIN and reply.client == "s05":
                    held.append(reply)
                else:
                    yield reply
            if requests[0].op != TRAIN:
                yield from held

        return late

    late = Middleware("late", layer)
    secure = secure_sum(Settings(groups=3), SECRET, 100.0, lambda number: LIKE, weighted=False)
    made = averaging(
        work=Work(lambda request, silo: (Reply(silo.name, request.round, dict(LIKE), 1.0), {})),
        select=lambda number: NAMES,
        aggregate=median(),
        middleware=[secure, late],
        transforms=[clip(1.0)],
    )
    _, report = made.server(made.init(LIKE), local(made.client, lambda name: silo_of(name, {}), {}))
    assert report["clients"] == 11 and "it was late" in report["dropped.s05"] and TAIL in held[0].tensors
