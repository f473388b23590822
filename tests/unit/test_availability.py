"""Silos that come late, leave, are slow or lose replies: who is asked, what is lost, and what is remembered."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Silo, Work
from fedllm.exchange.availability import Presence, availability, presences, told
from fedllm.exchange.fragments import fragments
from fedllm.exchange.quantise import quantise
from fedllm.runtime.local import local
from fedllm.silo.fit import slowed

NAMES = ["a", "b"]
PARAMS = {"layers.0.w": torch.zeros(64), "layers.1.w": torch.zeros(64)}


def train(request, silo):
    """Answer ones; remember in which rounds it trained, and what it was told."""
    seen = torch.cat([silo.memory.get("seen", torch.zeros(0)), torch.tensor([float(request.round)])])
    update = {name: torch.full_like(value, 1.0) for name, value in request.tensors.items()}
    return Reply(request.client, request.round, update, 1.0, {"slow": request.scalars.get("slow", 1.0)}), {"seen": seen}


def rounds(silos, count, memory, **parts):
    middleware = [availability(silos, 7)]
    algorithm = averaging(
        work=Work(train), select=lambda number: NAMES, aggregate=mean(), middleware=middleware, **parts
    )
    exchange = local(algorithm.client, lambda name: Silo(name, torch.nn.Module(), {}, {}, 0), memory)
    state, reports = algorithm.init(PARAMS), []
    for _ in range(count):
        state, report = algorithm.server(state, exchange)
        reports.append(report)
    return state, reports


def test_a_silo_that_is_away_is_not_asked_and_a_round_without_any_changes_nothing():
    memory = {}
    silos = {"a": Presence(first=2, away=[(4, 4)]), "b": Presence(last=2)}
    state, reports = rounds(silos, 5, memory)
    assert [report["clients"] for report in reports] == [1, 2, 1, 0, 1]
    assert [report.get("dropped.a") for report in reports] == ["it is away", None, None, "it is away", None]
    assert memory["a"]["work/seen"].tolist() == [1, 2, 4]
    assert memory["b"]["work/seen"].tolist() == [0, 1]
    assert state.round == 5
    assert state.params["layers.0.w"].tolist() == [-4.0] * 64


def test_a_silo_whose_reply_is_lost_has_trained_and_remembers_it():
    memory = {}
    _, reports = rounds({"a": Presence(drop=0.5), "b": Presence()}, 40, memory, transforms=[quantise(bits=4)])
    lost = [number for number, report in enumerate(reports) if report.get("dropped.a") == "its reply was lost"]
    assert 10 < len(lost) < 30
    assert "dropped.b" not in {key for report in reports for key in report}
    assert memory["a"]["work/seen"].tolist() == list(range(40))
    # The codec's memory at the silo is that of one whose replies all came: it cannot know.
    for name, value in memory["a"].items():
        assert torch.equal(value, memory["b"][name]) or name == "work/seen" or ":scales" in name


def test_what_is_lost_depends_on_seed_silo_and_round_alone():
    drawn = [
        [layer.lost(number, name) for number in range(50)]
        for layer in (availability({name: Presence(drop=0.3) for name in NAMES}, seed) for seed in (1, 1, 2))
        for name in NAMES
    ]
    assert drawn[0] == drawn[2] and drawn[1] == drawn[3]
    assert drawn[0] != drawn[1] and drawn[0] != drawn[4]


def test_all_replies_lost_is_a_round_that_changes_nothing_and_a_bad_reply_still_ends_the_run():
    silos = {name: Presence(drop=0.9999) for name in NAMES}
    state, reports = rounds(silos, 2, {})
    assert [report["clients"] for report in reports] == [0, 0] and torch.equal(
        state.params["layers.0.w"], torch.zeros(64)
    )
    algorithm = averaging(
        work=Work(train), select=lambda number: NAMES, aggregate=mean(),
        middleware=[availability({"a": Presence(first=2)}, 0)],
    )  # fmt: skip
    with pytest.raises(FedllmError, match="no usable update"):
        algorithm.server(algorithm.init(PARAMS), lambda requests: iter(()))


def test_a_silo_that_was_away_or_lost_is_sent_the_whole_model_of_fragments():
    sent = []

    def client(request, silo):
        update = {name: torch.ones(64) for name in PARAMS}
        return Reply(request.client, request.round, update, 1.0), {}

    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([torch.nn.Module(), torch.nn.Module()])
    for layer in model.layers:
        layer.w = torch.nn.Parameter(torch.zeros(64))
    algorithm = averaging(
        work=Work(client), select=lambda number: NAMES, aggregate=mean(), share=fragments(count=2),
        middleware=[availability({"a": Presence(away=[(3, 3)])}, 0)],
    )  # fmt: skip
    state, exchange = algorithm.init(PARAMS), local(algorithm.client, lambda n: Silo(n, model, {}, {}, 0), {})

    def noting(requests):
        sent.extend((request.round, request.client, len(request.tensors)) for request in requests)
        return exchange(requests)

    for _ in range(4):
        state, _ = algorithm.server(state, noting)
    # b gets one fragment a round after its first; a, away in round 3, gets both when it comes back.
    assert [(number, count) for number, name, count in sent if name == "b"] == [(0, 2), (1, 1), (2, 1), (3, 1)]
    assert [(number, count) for number, name, count in sent if name == "a"] == [(0, 2), (1, 1), (3, 2)]


def test_a_slow_silo_is_told_so_and_takes_a_part_of_the_steps():
    _, reports = rounds({"a": Presence(slow=5)}, 1, {})
    assert reports[0]["slow.a"] == 5 and reports[0]["slow.b"] == 1
    assert [slowed(25, slow) for slow in (1, 2, 5, 100)] == [25, 12, 5, 1]
    assert slowed(0, 5) == 0
    for nonsense in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(Refused, match="no slowness"):
            slowed(25, nonsense)


def test_what_the_plan_says():
    silos = presences(NAMES, 0.0, {"a": {"from": 3, "until": 9, "away": [[5, 6]], "drop": 0.5, "slow": 5}}, 10)
    assert list(told(silos)) == [
        "a from round 3, until round 9, away in rounds 5 to 6, 50% of its replies lost, 5 times slower"
    ]
    assert presences(NAMES, 0.5, {"a": {"drop": 0.0}}, 3) == {"a": Presence(), "b": Presence(drop=0.5)}


@pytest.mark.parametrize(
    ("silos", "reason"),
    [
        ({"c": {}}, r"availability\.silos\.c is not a silo of this run"),
        ({"a": {"form": 3}}, r"availability\.silos\.a\.form .*did you mean 'from'"),
        ({"a": {"from": 0}}, r"a\.from is 0; it is the number of a round, 1 or a later one"),
        ({"a": {"from": "3"}}, r"a\.from is '3'"),
        ({"a": {"from": 4, "until": 3}}, r"a\.until is 3; .* that of 'from' or later"),
        ({"a": {"away": [4, 6]}}, r"a\.away is \[4, 6\]; list the first and last"),
        ({"a": {"away": [[6, 4]]}}, r"a\.away is"),
        ({"a": {"away": 3}}, r"a\.away is 3"),
        ({"a": {"drop": 1}}, r"a\.drop is 1; .* below 1"),
        ({"a": {"drop": True}}, r"a\.drop is True"),
        ({"a": {"slow": 0.2}}, r"a\.slow is 0\.2; .* 1 or more"),
        ({"a": {"slow": "x"}}, r"a\.slow is 'x'"),
        ({"a": {"from": 11}}, "in none of the 10 rounds"),
        ({"a": {"from": 2}, "b": {"from": 3}}, "no silo is there in round 1"),
    ],
)
def test_what_makes_no_sense_is_one_sentence(silos, reason):
    with pytest.raises(FedllmError, match=reason):
        presences(NAMES, 0.0, silos, 10)
