"""Noise over the desks and workers of sites: their ledgers, the server's, and a site that has spent enough."""

from __future__ import annotations

import json

from fedllm.app.config import write_recipe
from fedllm.app.lead import lead
from fedllm.exchange.accounting import Mechanism, epsilon
from fedllm.exchange.ledger import read_ledger
from fedllm.runtime.store import read_events
from tests.federations import desks, line_to, make_site
from tests.integration.test_federation import place, recipe  # noqa: F401

NAMES = ["a", "b", "c"]
RECORDS = {"name": "dp_sgd", "clip": 0.5, "noise": 1.5, "rate": 0.25, "steps": 2}


def test_sites_add_noise_count_it_and_refuse_what_goes_too_far(place, recipe, tmp_path):  # noqa: F811
    server = {"name": "central_dp", "max_norm": 0.5, "noise": 2.0}
    private = recipe.model_copy(
        update={"client": RECORDS, "transforms": [server], "aggregate": {"name": "mean", "weights": "uniform"}}
    )
    whole = [Mechanism(1.5, "poisson", 0.25, times=6), Mechanism(1.0, times=3)]
    enough, little = (f"epsilon = {epsilon(whole, 1e-5) * factor}" for factor in (1.01, 0.99))
    data = f'train = "{place}/{{}}.jsonl"\ncolumns = {{{{ prompt = "frage" }}}}'
    rules = {"a": enough, "b": enough, "c": little}
    model = str(place / "model")
    files = [make_site(tmp_path / name, name, data.format(name), model, rules[name]) for name in NAMES]
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(write_recipe(private))
    (folder / "run.json").write_text('{"user": "admin"}')
    with desks(files) as opened:
        lead(folder, line_to(opened), NAMES)
    (asked,) = (event for event in read_events(folder) if event["event"] == "asked")
    assert asked["sites"] == ["a", "b"] and "over its life" in asked["refused"]["c"]
    lines = read_ledger(folder / "ledger.jsonl")
    assert [(each.round, each.silo) for each in lines if each.unit == "record"] == [
        (number, name) for number in (1, 2, 3) for name in "ab"
    ]
    for name in "ab":
        own = read_ledger(tmp_path / name / "state" / "ledger.jsonl")
        assert {(each.round, each.unit) for each in own} == {(n, u) for n in (1, 2, 3) for u in ("silo", "record")}
        assert (tmp_path / name / "state" / "secret").stat().st_size == 32
        # What was read in a round counts at the site, and how much that was is not told.
        audit = [json.loads(line) for line in (tmp_path / name / "state" / "audit.jsonl").read_text().splitlines()]
        read = [each for each in audit if each["what"] == "reply" and each["op"] == "train"]
        assert sum(each["tokens"] for each in read) > 0 and all("tokens" not in each["scalars"] for each in read)
    claims = {each["unit"]: each for each in json.loads((folder / "metrics.json").read_text())["privacy"]["claims"]}
    assert claims["record"]["silos"] == dict.fromkeys("ab", epsilon([whole[0]], 1e-5))
    assert claims["silo"]["epsilon"] == epsilon([Mechanism(2.0, times=3)], 1e-5)
    assert not (tmp_path / "c" / "state" / "ledger.jsonl").exists()
