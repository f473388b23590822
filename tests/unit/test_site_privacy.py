"""What a site's policy says about epsilon: counted over its life, by its own ledger, whatever the server asks for."""

from __future__ import annotations

import json

import pytest

from fedllm.app.catalog import CATALOG
from fedllm.app.site_privacy import spending
from fedllm.exchange.accounting import Mechanism, epsilon
from fedllm.exchange.ledger import read_ledger
from fedllm.federation.site.desk import Desk
from fedllm.federation.site.rules import by_epsilon, check, facts
from tests.desks import WORKER, ask, begin, finish, log_of, recipe, site_in
from tests.unit.test_policy import asked

LOCAL = {"name": "local_dp", "max_norm": 1.0, "noise": 20.0}
CENTRAL = {"name": "central_dp", "max_norm": 1.0, "noise": 20.0}
QUIET = {"evaluate": {"alone": False}}
RECORDS = {"name": "dp_sgd", "clip": 1.0, "noise": 2.0, "rate": 0.01, "steps": 5}


def of(folder, run, name="r1", **policy):
    site = site_in(folder, **policy)
    return list(by_epsilon(site, run, name, spending(site, folder / "site.toml")))


def local(rounds=10, **changes):
    return recipe(rounds=rounds, transforms=[LOCAL], **QUIET, **changes)


def test_a_recipe_may_spend_up_to_the_limit_and_no_more(tmp_path):
    whole = epsilon([Mechanism(20.0, times=10)], 1e-5)
    assert of(tmp_path, local(), epsilon=whole * 1.001) == []
    (found,) = of(tmp_path, local(), epsilon=whole * 0.999)
    assert found.rule == "epsilon" and "other runs have spent 0 and this recipe would bring it to" in found.sentence
    assert of(tmp_path, local(), epsilon=whole * 1.001, delta=1e-7), "a smaller delta asks for more noise"


def test_what_other_runs_spent_counts_and_the_own_run_counts_once(tmp_path):
    site = site_in(tmp_path)
    account = spending(site, tmp_path / "site.toml")
    for number in range(4):
        account.note(local(), "before", number)
        account.note(local(), "before", number)
    assert len(read_ledger(tmp_path / "state" / "ledger.jsonl")) == 4
    four, fourteen, ten = (epsilon([Mechanism(20.0, times=times)], 1e-5) for times in (4, 14, 10))
    assert account.after(local(), "r1") == pytest.approx((four, fourteen))
    assert account.after(local(), "before") == pytest.approx((0.0, ten))


def test_noise_inside_the_site_is_reckoned_by_its_rate(tmp_path):
    account = spending(site_in(tmp_path), tmp_path / "site.toml")
    run = recipe(rounds=10, client=RECORDS, **QUIET)
    assert account.after(run, "r1")[1] == epsilon([Mechanism(2.0, "poisson", 0.01, times=50)], 1e-5)
    # Of a record, noise for the whole site is worth half: a record that changes may turn the update round.
    account.note(local(), "before", 0)
    mixed = [Mechanism(2.0, "poisson", 0.01, times=50), Mechanism(10.0)]
    assert account.after(run, "r1")[1] == pytest.approx(epsilon(mixed, 1e-5))


def test_noise_at_the_server_counts_only_where_the_site_says_so_and_without_chance(tmp_path):
    run = asked(transforms=[CENTRAL], select={"name": "poisson", "rate": 0.01}, **QUIET)
    assert check(site_in(tmp_path, epsilon=9.0), run, CATALOG).rule == "epsilon"
    assert check(site_in(tmp_path, epsilon=9.0, trust_server=True), run, CATALOG) is None
    account = spending(site_in(tmp_path), tmp_path / "site.toml")
    whole = recipe(rounds=10, transforms=[CENTRAL], select={"name": "poisson", "rate": 0.01}, **QUIET)
    assert account.after(whole, "r1")[1] == epsilon([Mechanism(20.0, times=10)], 1e-5)


def test_a_recipe_that_does_not_say_its_noise_is_refused(tmp_path):
    (found,) = of(tmp_path, recipe(transforms=[{"name": "local_dp", "max_norm": 1.0}], **QUIET), epsilon=8.0)
    assert "cannot reckon what this recipe spends" in found.sentence


def test_a_clip_in_a_transform_with_noise_is_a_clip(tmp_path):
    assert facts(said(local())).clip == 1.0
    assert check(site_in(tmp_path, clip=1.0), asked(transforms=[CENTRAL]), CATALOG) is None


def said(run):
    return {"recipe": run, "algorithm": ["fedavg"], "user": "", "fedllm": "0.1.0", "model_sha256": "1" * 64}


def test_the_desk_notes_each_round_once_before_its_work_and_refuses_what_would_go_too_far(tmp_path):
    few = epsilon([Mechanism(20.0, times=3)], 1e-5) * 1.001
    site = site_in(tmp_path, epsilon=few)
    account = spending(site, tmp_path / "site.toml")
    with Desk(site, WORKER, CATALOG, spending=account) as desk:
        assert ask(desk, recipe=local(2))["allowed"]
        assert finish(desk, 0)["state"] == finish(desk, 0)["state"] == "done"
        begin(desk, 1)
        finish(desk, 0, "evaluate")
        refused = ask(desk, "r2", recipe=local(2))
        assert refused["rule"] == "epsilon" and "over its life" in refused["error"]
        assert ask(desk, "r3", recipe=local(1))["allowed"] and ask(desk, recipe=local(2))["allowed"]
    ledger = (tmp_path / "state" / "ledger.jsonl").read_text().splitlines()
    assert [(json.loads(line)["silo"], json.loads(line)["round"]) for line in ledger] == [("r1", 1), ("r1", 2)]
    assert [entry["rule"] for entry in log_of(tmp_path, "refuse")] == ["epsilon"]


def test_a_desk_without_an_accountant_refuses_where_there_is_a_limit(tmp_path):
    with Desk(site_in(tmp_path, epsilon=8.0), WORKER, CATALOG) as desk:
        assert "has no accountant" in ask(desk, recipe=local())["error"]


def test_a_site_has_its_own_half_and_its_own_secret(tmp_path, monkeypatch):
    """Its worker clips where the server adds the noise, and draws its own noise from a secret that outlives it."""
    from fedllm.app.worker import opened
    from tests.tiny import tiny_model, tiny_tokenizer

    tiny_model().save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    rows = [{"prompt": f"{number}?", "response": "the cat"} for number in range(20)]
    (tmp_path / "my.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "site.toml").write_text('name = "a"\n[data]\ntrain = "my.jsonl"\n')
    monkeypatch.setenv("FEDLLM_SITE", str(tmp_path / "site.toml"))
    run = recipe(
        model=str(tmp_path / "model"),
        transforms=[CENTRAL],
        client={"name": "dp_sgd", "clip": 1.0, "batch_size": 4},
        aggregate={"name": "mean", "weights": "uniform"},
        select={"name": "poisson", "rate": 0.1},
        privacy={"target_epsilon": 2.0, "delta": 1e-5},
        **QUIET,
    )
    one, again = (opened({"recipe": run, "model_sha256": ""}, tmp_path) for _ in range(2))
    assert one.secret == again.secret == (tmp_path / "state" / "secret").read_bytes()
    assert [step.name for step in one.plan.steps if step.where == "silo"] == ["local training", "encode: clip"]
    # It reckons with its own 18 records, of which it draws 4 a step on average.
    account = spending(site_in(tmp_path), tmp_path / "site.toml")
    assert 0 < account.after({**run, "transforms": []}, "r1")[1] <= 2.0
