"""Runs with secure sums on one machine: stopped and resumed they are the same bits; prompts, fragments, lost silos."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file

from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.plan_view import plan_lines
from fedllm.app.progress import Ui
from fedllm.app.results import summary, verdict
from fedllm.app.run import resume, run
from fedllm.core.errors import FedllmError, Interrupted
from fedllm.runtime.store import read_events
from tests.tiny import write_model, write_rows

SECRET = b"r" * 32


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("runs")
    write_model(place / "model", chat=True)
    for name in "abcd":
        rows = [{"prompt": f"{name} {i}?", "response": f"the cat sat {i}"} for i in range(16)]
        write_rows(place / f"{name}.jsonl", rows)
    return place


def table(place, **changes):
    plain = {
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "rounds": 2,
        "silos": {name: f"{name}.jsonl" for name in "abcd"},
        "data": {"root": str(place), "limit_test": 2},
        "trainable": {"name": "lora", "r": 2},
        "client": {"steps": 2, "batch_size": 2},
        "transforms": [{"name": "clip", "max_norm": 0.2}],
        "secure": {"drop_outs": 1, "largest_weight": 20},
        "evaluate": {"alone": False},
    }
    return {**plain, **changes}


def adapter(folder):
    return load_file(folder / "adapter" / "adapter_model.safetensors")


def rounds(folder):
    return [event for event in read_events(folder) if event["event"] == "round"]


class Stopping(Ui):
    """Stops the run at one of its steps."""

    def __init__(self, at):
        super().__init__(None)
        self.left = at

    def tick(self, tokens):
        self.left -= 1
        if not self.left:
            raise Interrupted("enough")
        super().tick(tokens)


def test_a_run_that_was_stopped_is_resumed_with_the_same_bits(place, tmp_path):
    shared = {"name": "dp_sgd", "clip": 1.0, "noise": 1.0, "noise_in": "sum", "steps": 1, "batch_size": 4}
    private = {"client": shared, "aggregate": {"weights": "uniform"}, "transforms": []}
    whole = table(place, runtime="local", **private)
    straight = run(whole, tmp_path / "straight", secret=SECRET)
    with pytest.raises(Interrupted):
        run(whole, tmp_path / "stopped", secret=SECRET, ui=Stopping(6))
    assert len(rounds(tmp_path / "stopped")) < 2
    resume(tmp_path / "stopped")
    one, other = adapter(straight), adapter(tmp_path / "stopped")
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    ledgers = [(folder / "ledger.jsonl").read_bytes() for folder in (straight, tmp_path / "stopped")]
    assert ledgers[0] == ledgers[1]


COMPOSED = {
    "a soft prompt": {"trainable": {"name": "prompt", "tokens": 4}},
    "fragments": {"share": {"name": "fragments", "count": 2}},
    "products": {"share": {"name": "product"}},
    "16 bits": {"secure": {"bits": 16, "largest_value": 0.05, "largest_weight": 20}},
    "noise at the server": {
        "transforms": [{"name": "central_dp", "max_norm": 0.2, "noise": 1e-6}],
        "aggregate": {"weights": "uniform"},
    },
}


@pytest.mark.parametrize("changes", COMPOSED.values(), ids=COMPOSED)
def test_what_it_goes_with_learns_what_it_learns_without(place, changes, tmp_path):
    secure = run(table(place, **changes), tmp_path / "secure", secret=SECRET)
    plain = run(table(place, **{**changes, "secure": None}), tmp_path / "plain", secret=SECRET)
    assert [event["clients"] for event in rounds(secure)] == [4, 4]
    one, other = adapter(secure), adapter(plain)
    largest = max(float((value - other[name]).abs().max()) for name, value in one.items())
    assert largest < (2e-4 if "secure" in changes else 2e-6)


def test_lost_silos_are_reported_and_a_round_with_too_few_changes_nothing(place, tmp_path):
    gone = {"silos": {"a": {"away": [[1, 2]]}, "b": {"away": [[2, 2]]}}}
    folder = run(table(place, availability=gone, rounds=3), tmp_path / "run")
    first, second, third = rounds(folder)
    assert third["clients"] == 4
    assert (first["clients"], first["dropped"]) == (3, {"a": "it is away"})
    assert second["clients"] == 0 and second["dropped"]["b"] == "it is away"
    assert "2 are lost already and 1 may be" in second["dropped"]["c"] or "secure.least" in second["dropped"]["c"]


def test_a_mask_that_all_silos_share_is_summed_and_one_that_remembers_is_refused_under_noise_for_records(
    place, tmp_path
):
    masked = [{"name": "random_k", "fraction": 0.25}, {"name": "clip", "max_norm": 0.2}]
    secure = run(table(place, transforms=masked), tmp_path / "secure", secret=SECRET)
    plain = run(table(place, transforms=masked, secure=None), tmp_path / "plain", secret=SECRET)
    one, other = adapter(secure), adapter(plain)
    assert max(float((value - other[name]).abs().max()) for name, value in one.items()) < 2e-6
    shared = {"name": "dp_sgd", "clip": 1.0, "noise": 1.0, "noise_in": "sum", "steps": 1, "batch_size": 4}
    records = table(place, transforms=masked, client=shared, aggregate={"weights": "uniform"})
    with pytest.raises(FedllmError, match="set error_feedback = false"):
        run(records, tmp_path / "records")


def test_a_median_over_sums_of_groups_runs_and_too_small_groups_are_refused(place, tmp_path):
    silos = {f"{name}{part}": f"{name}.jsonl" for name in "abcd" for part in (1, 2)}
    compared = table(place, silos=silos, aggregate={"name": "median"}, rounds=1)
    groups = {**compared, "secure": {"groups": 2, "largest_weight": 20}}
    told = [line for line in plan_lines(build(read_recipe(groups), weights=False)) if "groups" in line]
    assert any("2 groups, dealt anew each round, sums of 4 silos" in line and "fewer than 3" in line for line in told)
    folder = run(groups, tmp_path / "run")
    assert [event["clients"] for event in rounds(folder)] == [8]
    with pytest.raises(FedllmError, match=r"set secure.groups to 2 or fewer"):
        run({**compared, "secure": {"groups": 3}}, tmp_path / "small")
    with pytest.raises(FedllmError, match=r"set secure.groups to 3 or more"):
        run({**compared, "secure": {}}, tmp_path / "one")


def of_silos(value, names):
    """All that a thing of lists and tables says by the name of a silo."""
    if isinstance(value, dict):
        own = [each for key, each in value.items() if key in names]
        return [*own, *(found for each in value.values() for found in of_silos(each, names))]
    return [found for each in value for found in of_silos(each, names)] if isinstance(value, list) else []


@pytest.mark.parametrize("losses", [False, True])
def test_no_number_of_one_silo_is_in_a_run_unless_the_recipe_says_so(place, tmp_path, losses):
    made = table(place, rounds=1, secure={"drop_outs": 1, "largest_weight": 20, "losses": losses})
    folder = run(made, tmp_path / "run")
    told = of_silos(read_events(folder), "abcd") + of_silos(json.loads((folder / "metrics.json").read_text()), "abcd")
    numbers = [value for value in told if value]
    assert bool(numbers) is losses
    said = verdict(summary(read_events(folder)))
    assert ("mean held-out loss" in said) is losses and ("No silo told its held-out loss" in said) is not losses
    assert ("No silo told its held-out loss" in (folder / "report.html").read_text()) is not losses
    line = next(line for line in plan_lines(build(read_recipe(made), weights=False)) if "held-out loss" in line)
    assert line.startswith("not summed" if losses else "not told")


def test_the_mean_loss_in_the_sum_is_that_of_the_losses_that_silos_tell_without_it(place, tmp_path):
    gone = {"silos": {"a": {"away": [[2, 2]]}}}
    made = table(place, availability=gone, rounds=3)
    told = run({**made, "secure": {**made["secure"], "losses": True}}, tmp_path / "told", secret=SECRET)
    summed = run(made, tmp_path / "summed", secret=SECRET)
    (base,) = (event["loss"] for event in read_events(told) if event["event"] == "base")
    after = [base, *(event["loss"] for event in rounds(told))]
    for event, losses, there in zip(rounds(summed), after, ("abcd", "bcd", "abcd"), strict=False):
        found = event["summed"]
        assert (found["silos"], found["beyond"]) == (len(there), 0)
        # Weights that were read from text and ones kept in memory are the same bits; the grid's step is 64 x 4 / 2^31.
        assert abs(found["loss"] - sum(losses[name] for name in there) / len(there)) < 1e-6
    assert not any(of_silos(event.get("summed"), "abcd") for event in rounds(summed))
    assert all("summed" not in event for event in rounds(told))
    one, other = adapter(told), adapter(summed)
    assert all(torch.equal(value, other[name]) for name, value in one.items())
    first, last = (rounds(summed)[place]["summed"]["loss"] for place in (0, -1))
    said = verdict(summary(read_events(summed)))
    assert f"was {first:.3f} after 0 rounds and {last:.3f} after 2 rounds" in said
    page = (summed / "report.html").read_text()
    assert "Their mean, told in the secure sum alone, was" in page and "Held-out loss of the federated model" in page
    lines = "\n".join(plan_lines(build(read_recipe(made), weights=False)))
    assert "in the sum   the silos' held-out losses" in lines


def test_a_mean_loss_on_which_there_is_no_noise_is_not_told(place, tmp_path):
    together = [{"name": "distributed_dp", "max_norm": 0.2, "noise": 1e-6}]
    noisy = table(place, transforms=together, aggregate={"weights": "uniform"}, rounds=1)
    assert "summed" not in rounds(run(noisy, tmp_path / "noisy"))[0]
    assert "nor the mean of their held-out losses" in "\n".join(plan_lines(build(read_recipe(noisy), weights=False)))


def test_what_needs_the_losses_is_refused(place, tmp_path):
    with pytest.raises(FedllmError, match=r"secure.losses = true"):
        run(table(place, evaluate={"alone": False, "pooled": True}), tmp_path / "pooled")
