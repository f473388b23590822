"""Runs whose silos send products of LoRA's factors: with codecs, sums and noise, stopped and resumed, over desks."""

from __future__ import annotations

import json

import pytest
import torch

from fedllm.app.audits.case import recipe_in
from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.plan_view import plan_lines
from fedllm.app.run import resume, run
from fedllm.core.errors import FedllmError, Interrupted
from tests.integration.test_secure_runs import SECRET, Stopping, adapter, place, rounds, table  # noqa: F401


def recipe(place, **changes):  # noqa: F811
    return table(place, **{"secure": None, "transforms": [], "share": {"name": "product"}, **changes})


COMPOSED = {
    "a cohort and a server's Adam": {"runtime": "cohort", "optimiser": {"name": "fedadam"}},
    "a codec that remembers": {
        "transforms": [{"name": "top_k", "fraction": 0.2}, {"name": "quantise", "error_feedback": False}]
    },
    "noise at the server": {
        "transforms": [{"name": "central_dp", "max_norm": 0.2, "noise": 0.1}],
        "aggregate": {"weights": "uniform"},
    },
    "noise that silos add together": {
        "transforms": [{"name": "distributed_dp", "max_norm": 0.2, "noise": 0.1}],
        "aggregate": {"weights": "uniform"},
        "secure": {"drop_outs": 1, "largest_weight": 20},
    },
    "a mask in a secure sum": {
        "transforms": [{"name": "random_k", "fraction": 0.25}, {"name": "clip", "max_norm": 0.2}],
        "secure": {"drop_outs": 1, "largest_weight": 20},
    },
}


@pytest.mark.parametrize("changes", COMPOSED.values(), ids=COMPOSED)
def test_a_run_that_was_stopped_is_resumed_with_the_same_bits(place, changes, tmp_path):  # noqa: F811
    made = recipe(place, **{"runtime": "local", **changes})
    straight = run(made, tmp_path / "straight", secret=SECRET)
    with pytest.raises(Interrupted):
        run(made, tmp_path / "stopped", secret=SECRET, ui=Stopping(4 if "runtime" in changes else 13))
    assert len(rounds(tmp_path / "stopped")) < 2
    resume(tmp_path / "stopped")
    one, other = adapter(straight), adapter(tmp_path / "stopped")
    assert all(torch.equal(value, other[name]) and bool(value.isfinite().all()) for name, value in one.items())
    told = [event["truncation_error"] for event in rounds(straight)]
    assert all(0 < value < 1 for value in told)
    metrics = json.loads((straight / "metrics.json").read_text())
    assert metrics["truncation_error"] == told[-1] and "aggregation_error" not in metrics
    assert "cuts off" in (straight / "report.html").read_text()


def test_the_plan_says_that_what_goes_up_is_dense(place):  # noqa: F811
    parts = build(read_recipe(recipe(place)), weights=False)
    # Two layers of width 32 with half as many key and value heads: 32 x 32 twice and 16 x 32 twice in each.
    assert parts.plan.bytes_up == 4 * 2 * (2 * 32 * 32 + 2 * 16 * 32)
    assert parts.plan.bytes_down == 4 * sum(value.numel() for value in parts.params.values())
    assert any("select and share: the products B A" in line for line in plan_lines(parts))


REFUSED = {
    "measured for factors": {
        "client": {"name": "dp_sgd", "clip": 1.0, "noise": 1.0, "noise_in": "sum", "steps": 1, "batch_size": 4},
        "aggregate": {"weights": "uniform"},
        "secure": {"drop_outs": 1, "largest_weight": 20},
    },
    "A is frozen": {"trainable": {"name": "ffa_lora", "r": 2}},
    "needs all parameters in every round": {
        "transforms": [{"name": "banded_dp", "max_norm": 0.2, "noise": 1.0}],
        "aggregate": {"weights": "uniform"},
    },
}


@pytest.mark.parametrize(("why", "changes"), REFUSED.items(), ids=REFUSED)
def test_what_does_not_go_with_it_is_refused_by_the_plan(place, why, changes):  # noqa: F811
    with pytest.raises(FedllmError, match=why):
        build(read_recipe(recipe(place, **changes)), weights=False)


def test_an_audit_says_with_what_to_audit(place, tmp_path):  # noqa: F811
    folder = run(recipe(place, rounds=1), tmp_path / "run")
    with pytest.raises(FedllmError, match="whose updates show no less"):
        recipe_in(folder)
