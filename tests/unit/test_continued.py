"""What federated training keeps of the perplexity that pooled training gains, by hand; and how it is told."""

from __future__ import annotations

from math import log

import pytest

from benchmarks.continued import result
from fedllm.app.results import comparison, gain_kept, verdict

LOSS = {
    "base": {"a": log(20), "b": log(5)},
    "federated": {"a": log(11), "b": log(4.5)},
    "pooled": {"a": log(10), "b": log(6)},
}
GENERAL = {"base": {"wiki": log(30)}, "federated": {"wiki": log(32)}, "pooled": {"wiki": log(33)}}
METRICS = {"loss": LOSS, "general": GENERAL, "tokens": 100, "rounds": 2, "seconds": 90.0}


def test_it_is_the_share_of_the_perplexity_and_only_where_pooled_training_gains():
    assert gain_kept(LOSS) == {"a": pytest.approx((20 - 11) / (20 - 10))}
    assert gain_kept({kind: LOSS[kind] for kind in ("base", "federated")}) == {}


def test_the_benchmark_says_whether_the_goal_is_reached():
    told = result(METRICS)
    assert (told["gain_kept"], told["reached"], told["minutes"]) == ({"a": 0.9}, False, 1.5)
    assert told["forgetting"] == {"base": {"wiki": 30.0}, "federated": {"wiki": 32.0}, "pooled": {"wiki": 33.0}}


def test_the_terminal_says_it_and_what_was_forgotten():
    said = verdict(METRICS)
    assert "of the perplexity that pooled training gains it keeps 90%" in said
    assert "on general text (wiki) the perplexity was 30.00 and is 32.00" in said
    assert "wiki, general text" in list(comparison(METRICS).columns[0].cells)
