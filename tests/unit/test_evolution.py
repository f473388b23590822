"""A search that is kept as tensors after every generation is the search of `cma` itself, bit for bit."""

from __future__ import annotations

import warnings

import numpy as np
import pytest
import torch
from safetensors.torch import load, save

from fedllm.algorithms.evolution import ask, begin, new_search, strategy, tell
from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive

pytest.importorskip("cma")


def cost(points):
    scale = np.arange(1, points.shape[1] + 1)
    return ((points - 1) ** 2 * scale).sum(1)


@pytest.mark.parametrize("dim", [4, 24])
def test_kept_and_restored_every_generation_it_is_the_uninterrupted_run(dim):
    search = new_search(dim, 12, 0.7, 5)
    es, state = strategy(search, np.zeros(dim), 0.7, 0), begin(search)
    for generation in range(25):
        random = np.random.default_rng(derive(5, "generation", generation))
        es.sm.randn = lambda *shape, random=random: random.standard_normal(shape)
        points = np.stack(es.ask())
        asked = ask(search, state)
        assert torch.equal(asked, torch.tensor(points, dtype=torch.float32))
        assert torch.equal(ask(search, state), asked)
        rounded = asked.double().numpy()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            es.tell(list(rounded), cost(rounded).tolist())
        # The eigenvectors are those of the covariance as it stands, and lie in memory row by row: else the last bit of
        # a product may differ.
        es.sm.update_now(-1)
        es.sm.B = np.ascontiguousarray(es.sm.B)
        es._updateBDfromSM(es.sm)
        state = load(save(tell(search, state, asked, torch.tensor(cost(rounded)))))
        assert torch.equal(state["mean"], torch.tensor(es.mean))
        assert float(state["sigma"]) == es.sigma
    assert cost(state["mean"].numpy()[None])[0] < 0.1 * cost(np.zeros((1, dim)))[0]


def test_the_mean_moves_by_the_weights_of_the_better_half():
    search = new_search(3, 8, 1.0, 0)
    state = begin(search)
    points = ask(search, state)
    after = tell(search, state, points, torch.arange(8.0))
    raw = np.log(4.5) - np.log(np.arange(1, 5))
    assert after["mean"].numpy() == pytest.approx((raw / raw.sum()) @ points[:4].double().numpy(), abs=1e-12)


@pytest.mark.parametrize(
    ("settings", "word"), [((1, 8, 1.0), "dim"), ((4, 3, 1.0), "population"), ((4, 8, 0.0), "sigma")]
)
def test_settings_that_cannot_search_are_refused(settings, word):
    with pytest.raises(FedllmError, match=f"algorithm.{word}"):
        new_search(*settings, 0)
