"""Runs with homomorphic sums: on one machine, stopped and resumed, over desks with a key of the sites, and refused."""

from __future__ import annotations

import re

import pytest
import torch

from fedllm.app.audits.case import recipe_in
from fedllm.app.build import build
from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.homomorphic import key_from
from fedllm.app.plan_view import plan_lines
from fedllm.app.run import resume, run
from fedllm.core.errors import FedllmError, Interrupted
from fedllm.exchange.homomorphic.messages import OPEN
from fedllm.federation.site.record import ONCE
from tests.federations import desks, line_to, make_site
from tests.integration.test_federation import federate
from tests.integration.test_secure_runs import Stopping, adapter, place, rounds, table  # noqa: F401

pytest.importorskip("tenseal", reason="homomorphic sums need tenseal: pip install 'fedllm[homomorphic]'")

SECRET, KEY = b"r" * 32, "0123456789abcdef" * 4


def recipe(place, **changes):  # noqa: F811
    return table(place, **{"secure": None, "homomorphic": {"largest_weight": 20}, "rounds": 2, **changes})


def apart(one, other):
    return max(float((value - other[name]).abs().max()) for name, value in one.items())


COMPOSED = {
    "all": {},
    "some tensors": {"homomorphic": {"largest_weight": 20, "tensors": ["*.lora_B.*"]}},
    "a soft prompt": {"trainable": {"name": "prompt", "tokens": 4}},
    "fragments": {"share": {"name": "fragments", "count": 2}},
    "products": {"share": {"name": "product"}},
    "16 bits": {"homomorphic": {"bits": 16, "largest_value": 0.05, "largest_weight": 20}},
    "noise at the server": {
        "transforms": [{"name": "central_dp", "max_norm": 0.2, "noise": 1e-6}],
        "aggregate": {"weights": "uniform"},
    },
}


@pytest.mark.parametrize("changes", COMPOSED.values(), ids=COMPOSED)
def test_what_it_goes_with_learns_what_it_learns_without(place, changes, tmp_path):  # noqa: F811
    hidden = run(recipe(place, **changes), tmp_path / "hidden", secret=SECRET)
    plain = run(recipe(place, **{**changes, "homomorphic": None}), tmp_path / "plain", secret=SECRET)
    assert [event["clients"] for event in rounds(hidden)] == [4, 4]
    assert apart(adapter(hidden), adapter(plain)) < (2e-4 if "bits" in changes.get("homomorphic", {}) else 2e-6)
    assert "train_loss" not in rounds(hidden)[0]


def test_a_run_that_was_stopped_is_resumed_with_the_same_bits(place, tmp_path):  # noqa: F811
    whole = recipe(place, runtime="local")
    straight = run(whole, tmp_path / "straight", secret=SECRET)
    with pytest.raises(Interrupted):
        run(whole, tmp_path / "stopped", secret=SECRET, ui=Stopping(13))
    assert len(rounds(tmp_path / "stopped")) < 2
    resume(tmp_path / "stopped")
    one, other = adapter(straight), adapter(tmp_path / "stopped")
    assert all(torch.equal(value, other[name]) for name, value in one.items())


def test_lost_silos_are_reported_and_the_rest_add_up(place, tmp_path):  # noqa: F811
    gone = {"silos": {"a": {"away": [[1, 2]]}, "b": {"away": [[2, 2]]}}}
    first, second, third = rounds(run(recipe(place, availability=gone, rounds=3), tmp_path / "run"))
    assert third["clients"] == 4
    assert (first["clients"], first["dropped"]) == (3, {"a": "it is away"})
    assert second["clients"] == 0 and "2 silos are left and homomorphic.least is 3" in second["dropped"]["c"]


@pytest.fixture(scope="module")
def sites(place):  # noqa: F811
    model, opened = str(place / "model"), pytest.MonkeyPatch()
    opened.setenv("FEDLLM_KEY", KEY)
    files = [make_site(place / f"site_{n}", n, f'train = "{place}/{n}.jsonl"', model) for n in "abc"]
    with desks(files) as found:
        yield found
    opened.undo()


def test_sites_with_one_key_add_up_over_their_desks_and_the_server_has_none(place, sites):  # noqa: F811
    three = {name: f"{name}.jsonl" for name in "abc"}
    asked = read_recipe(recipe(place, silos=three, threads=1, runtime="local", federation={"patience": 5}))
    plain = adapter(run(asked.model_copy(update={"homomorphic": None}), place / "plain"))
    far = federate(place / "far", asked, line_to(sites), list("abc"))
    assert [event["clients"] for event in rounds(far)] == [3, 3]
    assert apart(adapter(far), plain) < 1e-6
    assert OPEN in ONCE
    kept = [path for path in far.rglob("*") if path.is_file()]
    assert kept and not any(bytes.fromhex(KEY) in path.read_bytes() for path in kept)


def test_a_site_without_the_key_says_what_to_do(monkeypatch):
    monkeypatch.delenv("FEDLLM_KEY", raising=False)
    with pytest.raises(FedllmError, match="FEDLLM_KEY has no key of 64 hexadecimal digits"):
        key_from("FEDLLM_KEY")


def test_the_plan_says_what_is_encrypted_and_what_is_seen(place):  # noqa: F811
    some = {"largest_weight": 20, "tensors": ["*.lora_B.*"]}
    for homomorphic, seen in (({}, "the server sees only the sum"), (some, "tensors that are in clear")):
        lines = "\n".join(plan_lines(build(read_recipe(recipe(place, homomorphic=homomorphic)), weights=False)))
        assert seen.removeprefix("the ") in lines and "2 silos open each sum" in lines
        counted = re.search(r"homomorphic  (\d+) of (\d+) tensors", lines)
        assert counted and (int(counted[2]) == int(counted[1]) * (2 if homomorphic else 1))


REFUSED = {
    "a second sum": ({"secure": {}}, "keep one of them"),
    "a method of its own": ({"algorithm": {"name": "black_box"}}, "take \\[homomorphic\\] out"),
    "no clip": ({"transforms": []}, "'clip' as the last"),
    "a codec": ({"transforms": [{"name": "clip", "max_norm": 1.0}, {"name": "quantise"}]}, "\\[homomorphic\\]"),
    "scores": ({"share": {"name": "scored_layers", "layers": 1}}, "share.name = 'everything'"),
    "each silo alone": ({"evaluate": {"alone": True}}, "evaluate.alone = false"),
    "noise in the sum": (
        {"transforms": [{"name": "distributed_dp", "max_norm": 1.0, "noise": 1.0}]},
        "add \\[secure\\]",
    ),
    "few silos": ({"select": {"name": "fixed_size", "size": 2}}, "homomorphic.least is 3"),
    "no such tensor": ({"homomorphic": {"tensors": ["lora"]}}, "which no tensor is called"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_go_with_it_is_refused_by_the_plan(place, changes, said):  # noqa: F811
    with pytest.raises(FedllmError, match=said) as refused:
        build(read_recipe(recipe(place, **changes)), weights=False)
    assert str(refused.value).count("\n") == 0


def test_an_audit_of_a_partly_encrypted_run_is_refused(place, tmp_path):  # noqa: F811
    some = {"largest_weight": 20, "tensors": ["*.lora_B.*"]}
    (tmp_path / "recipe.toml").write_text(write_recipe(read_recipe(recipe(place, homomorphic=some))))
    with pytest.raises(FedllmError, match="no attack here is made for that"):
        recipe_in(tmp_path)
