"""Noise that silos add together: how much is in the sum, what one record or silo can move, what is refused."""

from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.plan_view import plan_lines
from fedllm.core.errors import FedllmError
from fedllm.core.types import Reply
from fedllm.exchange.accounting import Mechanism, epsilon
from fedllm.exchange.secure.fixed_point import grid, room_for, rounded
from fedllm.exchange.secure.middleware import secure_sum
from fedllm.exchange.secure.noise import discrete_gaussian
from fedllm.exchange.secure.settings import Settings, SumNoise, circle
from fedllm.silo.dp_sgd import ROOM
from fedllm.silo.trainables import lora
from tests.laws.test_dp_sgd import ROWS, answer, by_hand, flat, model_of
from tests.secure_sums import SECRET, Wire, names_of

KEY = b"k" * 32


def test_the_discrete_gaussian_has_its_moments_and_its_probabilities():
    drawn = discrete_gaussian(KEY, 400_000, 200.0)
    assert drawn.dtype == np.int64 and abs(drawn.mean()) < 4 * 200 / math.sqrt(4e5)
    assert abs(drawn.std() / 200 - 1) < 4 / math.sqrt(8e5)
    # Against the definition, exp(-x^2 / 2 s^2) over its sum, in bins of 100.
    x = np.arange(-2000, 2001)
    exact = np.exp(-(x**2) / (2 * 200.0**2))
    exact /= exact.sum()
    edges = np.arange(-800, 801, 100)
    expected = np.array([exact[(x >= low) & (x < low + 100)].sum() for low in edges[:-1]]) * len(drawn)
    counts = np.array([((drawn >= low) & (drawn < low + 100)).sum() for low in edges[:-1]])
    assert ((counts - expected) ** 2 / expected).sum() < 45  # 16 bins: beyond it once in ten thousand


def test_noise_comes_again_with_its_key_and_not_with_another():
    one, other = (discrete_gaussian(key, 1000, 1e6) for key in (KEY, b"l" * 32))
    assert np.array_equal(one, discrete_gaussian(KEY, 1000, 1e6))
    assert abs(np.corrcoef(one, other)[0, 1]) < 0.15
    with pytest.raises(FedllmError, match="128 are needed"):
        discrete_gaussian(KEY, 10, 100.0)


def test_rounding_by_chance_moves_a_vector_no_more_than_the_noise_allows_for():
    by = grid(32, 1.0, 10, 1.0)
    values = np.random.default_rng(0).normal(size=100_000).astype(np.float32)
    values *= 0.5 / np.linalg.norm(values)
    numbers, beyond = rounded(values, by, 1.0, KEY)
    moved = numbers.view(np.int32) * by.step
    assert np.linalg.norm(moved) <= room_for(0.5, len(values), by) and beyond == 0
    assert np.abs(moved - values).max() < by.step
    coarse = grid(16, 1.0, 3)
    means = np.mean([rounded(values[:500], coarse, 1.0, bytes([n]) * 32)[0].view(np.int16) for n in range(200)], 0)
    # By chance to both sides: the mean is the value, to the standard error of 200 draws.
    assert np.abs(means - values[:500] / coarse.step).mean() < 1 / math.sqrt(200)


class Zeros(Wire):
    def train(self, request, silo):
        return Reply(silo.name, request.round, {key: torch.zeros(20_000) for key in ("a", "b")}, 1.0), {}


@pytest.mark.parametrize(("colluding", "lost"), [(0, 0), (0, 2), (2, 0), (2, 2)])
def test_the_sum_has_at_least_the_noise_that_is_claimed_however_many_are_lost(colluding, lost, monkeypatch):
    from tests import secure_sums

    monkeypatch.setattr(secure_sums, "LIKE", {key: torch.zeros(20_000) for key in ("a", "b")})
    settings, names = Settings(drop_outs=2, colluding=colluding), names_of(9)
    gone = names[:lost]
    wire = Zeros(
        settings,
        noise=SumNoise(0.5, 1.0),
        fault=lambda op, replies: [each for each in replies if op != "train" or each.client not in gone],
    )
    reply = wire.round(names)
    total = np.concatenate([value.numpy() for value in reply.tensors.values()]) * len(reply.of)
    # Each part is for 9 - 2 - colluding honest silos; those who collude can take theirs off again.
    honest = 9 - 2 - colluding
    left = total.std() * math.sqrt((9 - lost - colluding) / (9 - lost))
    assert circle(settings, 9, 9).honest == honest
    assert left == pytest.approx(0.5 * math.sqrt((9 - lost - colluding) / honest), rel=0.02)
    assert left > 0.5 * 0.98


def test_noise_needs_room_and_equal_weights():
    with pytest.raises(FedllmError, match="weights = 'uniform'"):
        secure_sum(Settings(), SECRET, 1.0, lambda number: {}, True, SumNoise(1.0, 1.0))
    with pytest.raises(FedllmError, match=r"secure\.bits = 32"):
        secure_sum(Settings(bits=16), SECRET, 1.0, lambda number: {}, False, SumNoise(1.0, 1.0))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    from tests.tiny import tiny_model, tiny_tokenizer

    folder = tmp_path_factory.mktemp("model")
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat=True).save_pretrained(folder)
    for name, count in {"a": 12, "b": 30, "c": 30, "d": 30}.items():
        rows = [f'{{"prompt": "who? {row}", "response": "the cat"}}\n' for row in range(count)]
        (folder / f"{name}.jsonl").write_text("".join(rows))
    return folder


SHARED = {"name": "dp_sgd", "clip": 1.0, "noise": 1.0, "noise_in": "sum", "steps": 1, "batch_size": 4}
TOGETHER = {"name": "distributed_dp", "max_norm": 0.5, "noise": 1.0}


def planned(model, **changes):
    table = {
        "model": str(model),
        "silos": {name: str(model / f"{name}.jsonl") for name in "abcd"},
        "trainable": {"name": "lora", "r": 2},
        "aggregate": {"weights": "uniform"},
        "secure": {"drop_outs": 1},
        "evaluate": {"alone": False},
        "rounds": 3,
        "device": "cpu",
        "dtype": "float32",
    }
    whole = {key: value for key, value in {**table, **changes}.items() if value is not None}
    return build(read_recipe(whole), weights=False)


def test_the_plan_says_what_the_noise_of_all_is_worth(model):
    told = "\n".join(plan_lines(planned(model, client=SHARED)))
    assert "server sees only the sum" in told and "added by the silos together" in told
    assert "epsilon" in told and "of one record of a silo" in told and "to the server when each silo took part" in told
    told = "\n".join(plan_lines(planned(model, transforms=[TOGETHER])))
    worth = epsilon([Mechanism(1.0, times=3)], 1e-5)
    assert f"epsilon {worth:.3g} at delta 1e-05 after 3 rounds, of a silo with all that it has" in told


@pytest.mark.parametrize(
    ("table", "missing", "package", "extra"),
    [
        ("secure", "cryptography", "cryptography", "privacy"),
        ("secure", "Crypto", "pycryptodome", "privacy"),
        ("homomorphic", "cryptography", "cryptography", "homomorphic"),
        ("homomorphic", "tenseal", "tenseal", "homomorphic"),
    ],
)
def test_only_a_recipe_with_sums_needs_their_libraries(model, table, missing, package, extra):
    code = (
        f"import sys; sys.modules['{missing}'] = None\n"
        "from fedllm.app.build import build\nfrom fedllm.app.config import read_recipe\n"
        "from fedllm.core.errors import FedllmError\n"
        f"table = {{'model': '{model}', 'device': 'cpu', 'evaluate': {{'alone': False}},\n"
        f"  'silos': {{n: '{model}/' + n + '.jsonl' for n in 'abcd'}},\n"
        "  'transforms': [{'name': 'clip', 'max_norm': 1.0}]}\n"
        "build(read_recipe(table), weights=False)\n"
        f"try:\n    build(read_recipe({{**table, '{table}': {{}}}}), weights=False)\n"
        "except FedllmError as error:\n    print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    said = f"[{table}] needs what is not installed ({package}); run `pip install 'fedllm[{extra}]'`."
    assert done.returncode == 0 and said in done.stdout, done.stderr[-2000:]


def test_noise_for_a_target_is_that_of_the_silo_which_needs_most(model):
    silent = {key: value for key, value in SHARED.items() if key != "noise"}
    parts = planned(model, client=silent, privacy={"target_epsilon": 4.0})
    found = parts.recipe.client["noise"]
    alone = planned(
        model,
        silos={name: str(model / f"{name}.jsonl") for name in "bcd"},
        client=silent,
        privacy={"target_epsilon": 4.0},
        secure={"drop_outs": 0},
    )
    assert found > alone.recipe.client["noise"]


NO = {
    "no sum": ({"client": SHARED, "secure": None}, "hides nothing unless the server sees only the sum"),
    "no sum for silos": ({"transforms": [TOGETHER], "secure": None}, r"add \[secure\]"),
    "two steps": ({"client": {**SHARED, "steps": 2}}, r"set client\.steps = 1"),
    "weighted": ({"client": SHARED, "aggregate": {"weights": "examples"}}, "weights = 'uniform'"),
    "twice": ({"client": SHARED, "transforms": [TOGETHER]}, "adds noise a second time"),
    "a decay": ({"client": {**SHARED, "weight_decay": 0.1}}, r"client\.weight_decay"),
    "too many lost": ({"client": SHARED, "secure": {"drop_outs": 2}}, "does not fit"),
    "16 bits": ({"client": SHARED, "secure": {"bits": 16}}, r"secure\.bits = 32"),
    "no bound": ({}, "name = 'clip'"),
    "alone": ({"transforms": [{"name": "clip", "max_norm": 1.0}], "evaluate": {}}, r"evaluate\.alone = false"),
    "each": (
        {
            "transforms": [
                {"name": "top_k", "fraction": 0.1, "error_feedback": False},
                {"name": "clip", "max_norm": 1.0},
            ]
        },
        "has to be undone for each silo's reply",
    ),
    "a vote": (
        {"algorithm": {"name": "black_box", "score": "loss"}, "trainable": {"name": "prompt"}},
        r"take \[secure\] out",
    ),
    "adaptive": ({"transforms": [{"name": "adaptive_dp", "noise": 1.0}]}, "name = 'clip'"),
}


@pytest.mark.parametrize(("changes", "why"), NO.values(), ids=NO)
def test_what_would_not_hold_is_refused_by_the_plan(model, changes, why):
    with pytest.raises(FedllmError, match=why):
        planned(model, **changes)


def test_a_record_moves_what_a_silo_adds_by_no_more_than_was_accounted_for():
    shared = {"clip": 0.3, "noise_in": "sum", "steps": 1, "rate": 1.0, "batch_size": 2, "learning_rate": 0.1}
    lora_model, unit = model_of(lora(4)), 0.1 * 0.3 / 2
    whole = answer(lora_model, **shared)
    # No step is taken: what is sent is learning_rate * the clipped sum over batch_size, whatever the rate draws.
    expected = by_hand(lora_model, ROWS, 0.3) * 0.1 / 2
    assert float((flat(whole.tensors) - expected).norm() / expected.norm()) < 1e-5
    left_out = [answer(lora_model, [*ROWS[:place], *ROWS[place + 1 :]], **shared) for place in range(len(ROWS))]
    moved = [float((flat(whole.tensors) - flat(less.tensors)).norm()) for less in left_out]
    assert max(moved) <= unit * (1 + 2.0**-10) and max(moved) > 0.99 * unit
    assert not whole.scalars and whole.weight == 1.0


def test_a_sum_of_many_gradients_is_brought_down_to_the_room_that_there_is():
    shared = {"clip": 0.3, "noise_in": "sum", "steps": 1, "rate": 1.0, "batch_size": 1, "learning_rate": 1.0}
    reply = answer(model_of(lora(4)), [ROWS[0]] * 9, **shared)
    assert float(flat(reply.tensors).norm()) == pytest.approx(ROOM * 0.3, rel=1e-5)
