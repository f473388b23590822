"""`fedllm audit` as a user types it: over a tiny run, with canaries, and where it cannot be done."""

from __future__ import annotations

import json
import re
import stat
import tomllib
from pathlib import Path

import pytest

import fedllm
from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.data import canaries_of, open_shards
from fedllm.app.site import own_recipe
from fedllm.core.errors import FedllmError
from fedllm.runtime.store import append_event
from fedllm.silo.canaries import canaries_in
from tests.integration.test_cli import call, place  # noqa: F401
from tests.integration.test_report_browser import BROWSER, PHONE, PROBE, browse

FEW = ("--trials", "2", "--tokens", "8", "--rows", "16")


def recipe(place, **changes):  # noqa: F811
    plain = {
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "rounds": 1,
        "silos": {"a": "a.jsonl", "b": "b.jsonl"},
        "data": {"root": str(place), "held_out": 0.3},
        "client": {"steps": 2, "batch_size": 4},
        "evaluate": {"alone": False},
    }
    return read_recipe({**plain, **changes})


def found(result, case, measure="tokens recovered"):
    return {each["attack"]: each for each in result["findings"] if each["case"] == case and each["measure"] == measure}


def test_an_audit_says_what_leaks_and_changes_nothing_else(place, monkeypatch, capsys):  # noqa: F811
    made = recipe(place, trainable={"name": "full"}, canaries={"count": 6, "repeat": 2})
    run = fedllm.run(made, place / "run")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    code, said, problem = call(monkeypatch, capsys, "audit", "run", *FEW)
    assert code == 0, problem
    assert "more than chance" in said and said.rstrip().endswith("run/privacy.html")
    assert {path: path.read_bytes() for path in before} == before
    assert {path.name for path in run.iterdir()} - {path.name for path in before} >= {"privacy.html", "privacy.json"}
    result = json.loads((run / "privacy.json").read_text())
    # Seven of eight tokens at most: the last of a text is read by nobody.
    one = found(result, "one record, plain step")
    assert one["span check"]["found"]["value"] > 0.7 and one["span check"]["leaks"]
    assert set(one) == {"span check", "embedding rows", "descent"}
    assert set(found(result, "one record, 4 of the run's own steps")) == set(one)
    assert "descent" in found(result, "one record, AdamW step", "text recovered in order (ROUGE-L)")
    assert result["descent"].startswith("2 records a case at most")
    assert found(result, "sum of 2 silos, one's text") and found(result, "a round as sent")
    areas = found(result, "the finished model", "AUC")
    assert set(areas) == {"loss", "loss against the base model", "Min-K%"}
    for each in result["findings"]:
        assert each["found"]["low"] <= each["found"]["value"] <= each["found"]["high"]
    assert result["epsilon"]["ledger"] is None and result["noise"] == [] and "texts" not in result
    page = (run / "privacy.html").read_text()
    assert "What would lower it" in page and "the server sees each silo" in page and "cat sat" not in page
    each = result["tensors"]["each"]
    assert sum(one["values"] for one in each) == pytest.approx(1) == sum(one["sensitivity"] for one in each)
    assert 0.1 <= sum(one["values"] for one in each if one["named"]) < 1
    assert result["tensors"]["setting"] in " ".join(said.split()) and "Which tensors tell the most" in page
    setting = tomllib.loads(result["tensors"]["setting"])["homomorphic"]["tensors"]
    assert sorted(setting) == sorted(one["name"] for one in each if one["named"])
    # The same seed finds the same.
    call(monkeypatch, capsys, "audit", "run", *FEW, "--show-text", "--attack", "updates")
    shown = json.loads((run / "privacy.json").read_text())
    assert shown["findings"] == result["findings"][: len(shown["findings"])]
    assert all(each["text"] and each["named"] for each in shown["texts"])


def test_noise_at_the_silo_brings_the_attacks_to_chance_and_the_ledger_stands_beside(place, monkeypatch, capsys):  # noqa: F811
    made = recipe(
        place,
        trainable={"name": "full"},
        client={"name": "dp_sgd", "clip": 1.0, "steps": 1, "batch_size": 4},
        privacy={"target_epsilon": 8},
        canaries={"count": 6},
    )
    fedllm.run(made, place / "run")
    code, _, problem = call(monkeypatch, capsys, "audit", "run", *FEW, "--attack", "updates", "--attack", "canaries")
    assert code == 0, problem
    result = json.loads((place / "run" / "privacy.json").read_text())
    assert not any(each["leaks"] for each in found(result, "one record, plain step").values())
    epsilon = result["epsilon"]
    assert 0 <= epsilon["told"]["epsilon"] <= epsilon["limit"] == epsilon["ledger"] <= 8
    page = (place / "run" / "privacy.html").read_text()
    assert "every silo adds noise" in page and "do not contradict each other" in page


def test_noise_at_the_server_leaves_the_update_as_the_server_sees_it(place):  # noqa: F811
    from fedllm.app.audits.case import open_case
    from fedllm.app.audits.views import round_of, sampled, steps_on_one
    from fedllm.app.progress import Ui

    made = recipe(
        place,
        trainable={"name": "full"},
        aggregate={"name": "mean", "weights": "uniform"},
        transforms=[{"name": "central_dp", "max_norm": 0.5, "noise": 1.0}],
    )
    case = open_case(fedllm.run(made, place / "run"), 0, 2, 8, 0, Ui(None))
    data = {name: sampled(case, name, 1) for name in "ab"}
    view = round_of(case, steps_on_one(case, 20, plain=True), data)
    norms = {name: sum(float(v.norm()) ** 2 for v in update.values()) ** 0.5 for name, update in view.each.items()}
    assert all(norm <= 0.5 * 1.001 for norm in norms.values())
    count = sum(value.numel() for value in view.whole.values())
    whole = sum(float(value.norm()) ** 2 for value in view.whole.values()) ** 0.5
    # Noise of 1.0 * 0.5 / 2 on every value of the mean.
    assert whole == pytest.approx(0.25 * count**0.5, rel=0.05)


def test_behind_a_secure_sum_only_the_sum_is_attacked(place, monkeypatch, capsys):  # noqa: F811
    made = recipe(
        place,
        silos={name: "a.jsonl" for name in "abcd"},
        trainable={"name": "full"},
        transforms=[{"name": "clip", "max_norm": 5.0}],
        secure={"drop_outs": 1},
    )
    fedllm.run(made, place / "run")
    code, _, problem = call(monkeypatch, capsys, "audit", "run", *FEW, "--attack", "updates", "--attack", "origin")
    assert code == 0, problem
    result = json.loads((place / "run" / "privacy.json").read_text())
    cases = {each["case"] for each in result["findings"]}
    assert cases == {"sum of 4 silos, one's text", "sum of 4 silos, all texts", "a round as sent"}
    assert "that sum is what was attacked" in (place / "run" / "privacy.html").read_text()


def test_canaries_are_the_silos_own_and_the_same_again(place):  # noqa: F811
    made = recipe(place, canaries={"count": 8, "repeat": 3})
    shards = open_shards(made)
    files = sorted((place / "canaries").iterdir())
    assert [path.name for path in files] == ["a.jsonl", "b.jsonl"]
    assert all(stat.S_IMODE(path.stat().st_mode) == 0o600 for path in files)
    for name, shard in shards.items():
        canaries = canaries_of(name, made)
        planted = [each for each in canaries if each.planted]
        told = [row for row in shard.train if "access code" in row["prompt"]]
        assert len(told) == 3 * len(planted) and not any("access code" in row["prompt"] for row in shard.test)
        assert {row["response"][-6:] for row in told} == {each.secret for each in planted}
    again = open_shards(made)
    assert [list(shard.train) for shard in again.values()] == [list(shard.train) for shard in shards.values()]
    with pytest.raises(FedllmError, match=r"has 8 canaries and canaries.count is 9; set it to 8"):
        open_shards(recipe(place, canaries={"count": 9}))
    with pytest.raises(FedllmError, match="tells secrets in text, and task 'classify'"):
        open_shards(recipe(place, canaries={"count": 8}, task={"name": "classify", "words": ["x", "y"]}))


def test_no_site_plants_canaries_for_a_server(place):  # noqa: F811
    made = recipe(place, canaries={"count": 8, "folder": str(place / "elsewhere")})
    with pytest.raises(FedllmError, match="no site plants any for a server; take the table out"):
        build(made, weights=False, elsewhere=["a", "b"])
    (place / "site.toml").write_text('name = "a"\n[data]\ntrain = "a.jsonl"\n')
    assert own_recipe(made.model_dump(exclude_none=True), place / "site.toml").canaries is None


def test_a_broken_file_of_canaries_is_said(tmp_path):
    (tmp_path / "a.jsonl").write_text("no json\n")
    with pytest.raises(FedllmError, match=r"a.jsonl' cannot be read"):
        canaries_in(tmp_path / "a.jsonl", 1)


def test_what_cannot_be_audited_is_one_sentence(place, monkeypatch, capsys):  # noqa: F811
    run = fedllm.run(recipe(place), place / "run")

    def refused(*words: str) -> str:
        code, _, said = call(monkeypatch, capsys, "audit", *words)
        assert code == 2 and said.startswith("Error: ") and said.count("\n") == 1, said
        return said

    assert "There is no run in 'nowhere'" in refused("nowhere")
    assert "--attack 'update' is unknown; did you mean 'updates'?" in refused("run", "--attack", "update")
    assert "planted no canaries" in refused("run", "--attack", "canaries")
    (place / "a.jsonl").rename(place / "gone.jsonl")
    assert "a.jsonl does not exist" in refused("run")
    append_event(run, {"event": "round", "round": 2})
    assert "has not come to its end; `fedllm resume run` goes on" in refused("run")
    append_event(run, {"event": "start", "runtime": "federation"})
    assert "lies at its sites" in refused("run")
    assert not (run / "privacy.html").exists()


RESULT = {
    "run": "<script>alert(1)</script>",
    "time": "2026-11-20T10:00:00Z",
    "model": "smollm2",
    "trainable": "lora",
    "silos": 9,
    "examples": 900,
    "seed": 0,
    "trials": 16,
    "tokens": 24,
    "rows": 256,
    "attacks": ["updates", "membership", "canaries", "origin"],
    "descent": "4 records a case at most",
    "sum_only": False,
    "noise": [],
    "open": [],
    "at_server": False,
    "findings": [
        {"attack": attack, "case": case, "measure": measure, "chance": 0.3, "leaks": leaks, "share": share,
         "found": {"value": 0.9, "low": 0.8, "high": 0.95, "n": 16}}
        for attack, case, measure, leaks, share in (
            ("span check", "one record, plain step", "tokens recovered", True, True),
            ("embedding rows", "one record, plain step", "tokens recovered", True, True),
            ("span check", "sum of 9 silos, one's text", "tokens recovered", False, True),
            ("span check", "a round as sent", "tokens recovered", False, True),
            ("span check", "one record, plain step", "text recovered in order (ROUGE-L)", True, True),
            ("loss", "the finished model", "AUC", False, False),
            ("Min-K%", "the finished model", "AUC", True, False),
            ("loss", "the finished model", "found at 1 % false alarms", False, True),
            ("exposure", "canaries that were planted", "exposure in bits", True, False),
            ("prompting", "canaries that were planted", "told word for word", True, True),
            ("nearest update", "9 silos, an update without a name", "given to the right silo", True, True),
        )
    ],
    "epsilon": {"told": {"epsilon": 9.1, "guesses": 20, "right": 19, "most": 9.2}, "unit": "one record of a silo",
                "ledger": 2.0, "rows": 3, "limit": 6.0},
    "texts": [{"text": "<b>a record</b>", "named": ["<b>", "a"], "built": "a rec"}],
}  # fmt: skip


@pytest.mark.skipif(BROWSER is None, reason="no Chromium is on PATH")
def test_the_page_is_drawn_quiet_and_no_wider_than_a_phone(tmp_path: Path) -> None:
    from fedllm.app.report.audit import render

    page = render(RESULT)
    assert "is wrong. Do not publish this model." in page
    assert "<b>" not in page and "<script>alert" not in page
    (tmp_path / "page.html").write_text(page)
    probed, count = re.subn(r'<meta http-equiv="Content-Security-Policy"[^>]*>', lambda _: PROBE, page)
    assert count == 1
    (tmp_path / "probed.html").write_text(probed)
    (tmp_path / "phone.html").write_text(PHONE)
    whole = browse(tmp_path / "page.html", tmp_path / "wide", "--dump-dom")
    assert 'data-drawn="4"' in whole.stdout and "CONSOLE" not in whole.stderr
    seen = browse(tmp_path / "phone.html", tmp_path / "profile", "--dump-dom")
    told = json.loads(re.search(r'<pre id="found">(.+?)</pre>', seen.stdout)[1].replace("&amp;", "&"))
    assert told["errors"] == [] and told["fetched"] == 0 and told["width"] <= 375 and told["cut"] == []
