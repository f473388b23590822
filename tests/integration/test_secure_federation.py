"""Secure aggregation over the desks and workers of sites: a run as on one machine, a lost site, one that insists."""

from __future__ import annotations

import pytest
from safetensors.torch import load_file

from fedllm.app.config import read_recipe
from fedllm.app.run import run
from fedllm.exchange.secure.messages import TRAIN
from fedllm.exchange.secure.middleware import PHASES
from fedllm.federation.site.record import ONCE
from fedllm.runtime.line import Aborted, Line, Unreachable
from fedllm.runtime.store import read_events
from tests.federations import desks, line_to, make_site
from tests.integration.test_federation import federate
from tests.tiny import write_model, write_rows

NAMES = ["a", "b", "c", "d"]
INSISTS = "secure_aggregation = true\nclip = 0.1\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("secure")
    write_model(place / "model", chat=True)
    for number, name in enumerate(NAMES):
        rows = [{"prompt": f"{name} {i}?", "response": f"the cat sat {i * (number + 2)}"} for i in range(14 + number)]
        write_rows(place / f"{name}.jsonl", rows)
    return place


@pytest.fixture(scope="module")
def recipe(place):
    return read_recipe(
        {
            "model": str(place / "model"),
            "rounds": 2,
            "threads": 1,
            "runtime": "local",
            "silos": {name: str(place / f"{name}.jsonl") for name in NAMES},
            "task": {"name": "instruct", "max_tokens": 48},
            "trainable": {"name": "lora", "r": 2},
            "client": {"steps": 2, "batch_size": 2},
            "transforms": [{"name": "clip", "max_norm": 0.1}],
            "secure": {"drop_outs": 1, "largest_weight": 20},
            "evaluate": {"alone": False},
            "federation": {"patience": 5},
        }
    )


@pytest.fixture(scope="module")
def sites(place):
    data, model = f'train = "{place}/{{}}.jsonl"', str(place / "model")
    with desks([make_site(place / f"site_{n}", n, data.format(n), model, INSISTS) for n in NAMES]) as opened:
        yield opened


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def rounds(folder):
    return [event for event in read_events(folder) if event["event"] == "round"]


def test_the_sum_over_desks_is_that_of_one_machine_and_close_to_the_plain_mean(place, recipe, sites):
    plain = adapter(run(recipe.model_copy(update={"secure": None}), place / "plain"))
    here = adapter(run(recipe, place / "here"))
    far = federate(place / "far", recipe, line_to(sites), NAMES)
    assert [event["clients"] for event in rounds(far)] == [4, 4]
    for name, value in adapter(far).items():
        # Rounding by chance is each site's own, and less than a step: bits differ, values hardly.
        for other in (here, plain):
            assert float((value - other[name]).abs().max()) < 1e-6
    event = rounds(far)[0]
    assert "train_loss" not in event and event["tokens"] == 0 and event["summed"]["silos"] == 4


def test_a_site_that_is_lost_after_it_shared_its_keys_does_no_harm(place, recipe, sites):
    plain = line_to(sites)

    def call(site, head, body, seconds):
        if site == "b" and head.get("request", {}).get("op") == "train" and head["request"]["round"] == 1:
            raise Unreachable("the link is cut")
        return plain.call(site, head, body, seconds)

    asked = recipe.model_copy(update={"federation": recipe.federation.model_copy(update={"patience": 1})})
    folder = federate(place / "lost", asked, Line(call, plain.sites), NAMES)
    assert [event["clients"] for event in rounds(folder)] == [4, 3]
    assert "link is cut" in rounds(folder)[1]["dropped"]["b"] or "no sign" in rounds(folder)[1]["dropped"]["b"]


def test_sites_that_insist_on_sums_refuse_a_recipe_without(place, recipe, sites):
    from fedllm.core.errors import FedllmError

    with pytest.raises(FedllmError, match=r"add \[secure\] to the recipe"):
        federate(place / "bare", recipe.model_copy(update={"secure": None}), line_to(sites), NAMES)


def test_no_mean_loss_is_told_where_a_site_lets_no_loss_out(place, recipe, tmp_path):
    data, model = f'train = "{place}/{{}}.jsonl"', str(place / "model")
    own = {name: INSISTS + 'metrics = ["tokens"]\n' * (name == "c") for name in NAMES}
    with desks([make_site(tmp_path / name, name, data.format(name), model, own[name]) for name in NAMES]) as sites:
        folder = federate(tmp_path / "run", recipe.model_copy(update={"rounds": 1}), line_to(sites), NAMES)
    (event,) = rounds(folder)
    assert event["clients"] == 4 and "summed" not in event


def test_a_sites_desk_does_each_phase_once_a_round():
    assert {TRAIN, *PHASES} <= set(ONCE)


@pytest.mark.parametrize("op", [TRAIN, "secure_sum"])
def test_a_server_that_is_killed_within_a_round_begins_it_again_with_the_same_sum(place, recipe, sites, op):
    plain, killed = line_to(sites), [False]

    def call(site, head, body, seconds):
        asked = head.get("request", {})
        if site == "c" and (asked.get("op"), asked.get("round")) == (op, 1) and not killed[0]:
            killed[0] = True
            raise Aborted("The server is killed.")
        return plain.call(site, head, body, seconds)

    folder = place / f"killed-{op}"
    with pytest.raises(Aborted):
        federate(folder, recipe, Line(call, plain.sites), NAMES)
    assert len(rounds(folder)) == 1
    federate(folder, recipe, plain, NAMES)
    assert [event["clients"] for event in rounds(folder)] == [4, 4]
    expected = adapter(run(recipe.model_copy(update={"secure": None}), place / f"plain-{op}"))
    for name, value in adapter(folder).items():
        assert float((value - expected[name]).abs().max()) < 1e-6
