"""Recipes with noise as a user runs them: the plan, the progress, the metrics, the report, and what is refused."""

from __future__ import annotations

import json

import pytest

import fedllm
from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.plan_view import plan_lines
from fedllm.app.privacy import planned_epsilons, resolved
from fedllm.core.errors import FedllmError
from fedllm.exchange.accounting import Mechanism, epsilon
from fedllm.exchange.ledger import read_ledger
from tests.integration.test_resume import place  # noqa: F401

EVEN = {"name": "mean", "weights": "uniform"}


def central(**settings):
    return {"name": "central_dp", "max_norm": 0.5, **settings}


def recipe(place, **changes):  # noqa: F811
    plain = {
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "rounds": 3,
        "silos": {name: f"{name}.jsonl" for name in "abc"},
        "data": {"root": str(place), "limit_test": 2},
        "client": {"steps": 1, "batch_size": 2},
        "evaluate": {"alone": False},
        "aggregate": EVEN,
    }
    return read_recipe({**plain, **changes})


def text(parts):
    return "\n".join(plan_lines(parts))


def test_a_target_is_solved_for_spent_round_by_round_and_told(place, tmp_path):  # noqa: F811
    made = recipe(place, transforms=[central()], privacy={"target_epsilon": 20})
    planned = text(build(made, weights=False))
    assert "epsilon 20 at delta 1e-05 after 3 rounds, of a silo with all that it has" in planned
    assert (
        "not covered  each silo's held-out loss, size and names of its groups of text; to the server each silo's update"
        in planned
    )
    folder = fedllm.run(made, tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    (claim,) = metrics["privacy"]["claims"]
    assert 19.8 < claim["epsilon"] <= 20 and claim["by"] == ["server"]
    events = [json.loads(line) for line in (folder / "events.jsonl").read_text().splitlines()]
    spent = [event["epsilon"]["silo"] for event in events if event["event"] == "round"]
    assert spent == sorted(spent) and spent[-1] == claim["epsilon"]
    assert "aggregation_error" not in metrics, "what a probe tells has no noise on it"
    report = (folder / "report.html").read_text()
    assert "Whether any one silo took part at all" in report and "The server adds the noise" in report
    assert "nor differential privacy" not in report and "No privacy guarantee" not in report
    # The same ledger, the same secret, the same noise: nothing new when it is resumed.
    before = (folder / "ledger.jsonl").read_bytes()
    fedllm.resume(folder)
    assert (folder / "ledger.jsonl").read_bytes() == before
    assert (folder / "secret").stat().st_mode & 0o077 == 0 and b"secret" not in (folder / "recipe.toml").read_bytes()


def test_a_run_ends_before_it_spends_too_much_and_its_result_is_that_of_the_last_round(place, tmp_path):  # noqa: F811
    two = epsilon([Mechanism(2.0, times=2)], 1e-5)
    made = recipe(place, transforms=[central(noise=2.0)], privacy={"stop_at_epsilon": two * 1.001})
    folder = fedllm.run(made, tmp_path / "run")
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["rounds"] == 2 and metrics["stopped"].startswith("stopped after round 2: the next one would bring")
    assert metrics["privacy"]["claims"][0]["epsilon"] == two
    assert (folder / "adapter" / "adapter_model.safetensors").exists()
    fedllm.resume(folder)
    assert json.loads((folder / "metrics.json").read_text())["rounds"] == 2
    with pytest.raises(FedllmError, match="The first round would bring epsilon to"):
        fedllm.run(recipe(place, transforms=[central(noise=0.1)], privacy={"stop_at_epsilon": 1.0}), tmp_path / "no")


def test_each_silo_has_an_epsilon_of_its_own_where_records_are_hidden(place, tmp_path):  # noqa: F811
    made = recipe(
        place,
        client={"name": "dp_sgd", "clip": 0.5, "noise": 1.0, "steps": 2, "batch_size": 4},
        data={"root": str(place), "limit_test": 2, "limit_train": 20},
        rounds=1,
    )
    folder = fedllm.run(made, tmp_path / "run")
    (claim,) = json.loads((folder / "metrics.json").read_text())["privacy"]["claims"]
    expected = epsilon([Mechanism(1.0, "poisson", 4 / 20, times=2)], 1e-5)
    assert claim["silos"] == {name: expected for name in "abc"} and claim["by"] == ["silo"]
    event = json.loads((folder / "events.jsonl").read_text().splitlines()[2])
    assert "train_loss" not in event and event["tokens"] == 0, "losses and counts have no noise on them"


def test_a_silo_that_trusts_nobody_sends_nothing_else(place, tmp_path):  # noqa: F811
    made = recipe(place, transforms=[{"name": "local_dp", "max_norm": 0.5, "noise": 5.0}], rounds=1)
    folder = fedllm.run(made, tmp_path / "run")
    assert {entry.silo for entry in read_ledger(folder / "ledger.jsonl")} == set("abc")
    event = json.loads((folder / "events.jsonl").read_text().splitlines()[2])
    assert "train_loss" not in event and event["epsilon"]["silo"] == epsilon([Mechanism(5.0)], 1e-5)


def test_who_takes_turns_spends_in_its_own_turns_only(place, tmp_path):  # noqa: F811
    select, banded = {"name": "cyclic", "every": 3}, {"name": "banded_dp", "max_norm": 0.5, "noise": 3.0}
    made = recipe(place, transforms=[banded], select=select, rounds=4)
    two = epsilon([Mechanism(3.0, times=2)], 1e-5)
    assert planned_epsilons(made, 3)["silo"].best == two
    folder = fedllm.run(made, tmp_path / "run")
    (claim,) = json.loads((folder / "metrics.json").read_text())["privacy"]["claims"]
    assert claim["silos"]["turn 1 of 3"] == claim["epsilon"] == two > claim["silos"]["turn 2 of 3"]


def test_without_noise_no_epsilon_is_said(place):  # noqa: F811
    clipped = recipe(place, transforms=[{"name": "clip", "max_norm": 0.1}])
    assert "none is claimed: no noise is added" in text(build(clipped, weights=False))
    assert planned_epsilons(clipped, 3) == {}


def banded(**changes):
    return {"transforms": [{"name": "banded_dp", "max_norm": 1.0, "noise": 1.0}], **changes}


REFUSED = [
    ({"transforms": [central()]}, r"has no 'noise'; set it"),
    (
        {"privacy": {"target_epsilon": 8}},
        r"privacy\.target_epsilon is 8, but nothing in the recipe clips and adds noise",
    ),
    ({"privacy": {"stop_at_epsilon": 8}}, r"privacy\.stop_at_epsilon is 8, but nothing"),
    ({"transforms": [central(noise=0.1)], "privacy": {"target_epsilon": 1}}, r"leave out 'noise' and it is solved for"),
    ({"transforms": [central(noise=1.0)], "aggregate": "mean"}, r"every silo counts alike"),
    ({"transforms": [{"name": "quantise"}, central(noise=1.0)]}, r"undoes the clip at the server; put it first"),
    ({"transforms": [central(noise=1.0), central(noise=1.0)]}, r"a second time; keep one"),
    ({"client": {"name": "dp_sgd", "clip": 1.0}}, r"client\.noise is missing; set it"),
    ({"transforms": [central(noise=1.0)], "duplicates": {}}, r"hashes of texts leave without noise"),
    (banded(select={"name": "poisson", "rate": 0.5}), r"'banded_dp' is for silos that take turns"),
    (banded(select={"name": "cyclic", "every": 2}, share={"name": "fragments", "count": 2}), r"needs all parameters"),
]


@pytest.mark.parametrize(("changes", "sentence"), REFUSED, ids=[str(number) for number in range(len(REFUSED))])
def test_what_cannot_be_guaranteed_is_refused_before_anything_runs(place, tmp_path, changes, sentence):  # noqa: F811
    with pytest.raises(FedllmError, match=sentence):
        fedllm.run(recipe(place, **changes), tmp_path / "run")
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_between_machines_nobody_tells_what_it_reaches_alone(place):  # noqa: F811
    made = recipe(place, transforms=[central(noise=1.0)], evaluate={"alone": True})
    with pytest.raises(FedllmError, match=r"evaluate\.alone lets every site tell"):
        build(made, weights=False, elsewhere=["a", "b"])


def test_what_is_solved_for_is_written_down(place):  # noqa: F811
    made = recipe(
        place, transforms=[central()], privacy={"target_epsilon": 3.0}, select={"name": "poisson", "rate": 0.5}
    )
    noise = resolved(made, 3).transforms[0]["noise"]
    whole = [Mechanism(noise, "poisson", 0.5, times=3)]
    assert epsilon(whole, 1e-5) <= 3.0 < epsilon([whole[0]._replace(multiplier=noise * 0.998)], 1e-5)
    assert resolved(resolved(made, 3), 3) == resolved(made, 3)
