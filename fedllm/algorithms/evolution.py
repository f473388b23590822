"""CMA-ES as tensors: a search distribution that can be asked, told, kept and gone on with, to the last bit.

Hansen and Ostermeier 2001 (Evolutionary Computation 9:2); the arithmetic is that of the package `cma` (Hansen, Akimoto
and Baudis 2019, doi:10.5281/zenodo.2559634), which is built anew from the tensors for every step and let go after it.
"""

from __future__ import annotations

import warnings
from types import SimpleNamespace
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.core.types import Tensors

LEAST = 4
"""Candidates of a generation, at least."""


class Search(NamedTuple):
    """What stays the same in a search."""

    dim: int
    population: int
    sigma: float
    """Standard deviation of the first generation's coordinates."""
    seed: int


def new_search(dim: int, population: int, sigma: float, seed: int) -> Search:
    """Check the settings of a search; raises `FedllmError`."""
    if dim < 2:
        raise FedllmError(f"algorithm.dim is {dim}; search in at least 2 dimensions.")
    if population < LEAST:
        raise FedllmError(f"algorithm.population is {population}; a generation needs at least {LEAST} candidates.")
    if not 0 < sigma < float("inf"):
        raise FedllmError(f"algorithm.sigma is {sigma}; it must be above 0.")
    return Search(dim, population, sigma, seed)


def begin(search: Search) -> dict[str, Tensor]:
    """Return the state before the first generation."""
    return kept(strategy(search, np.zeros(search.dim), search.sigma, 0))


def at(search: Search, mean_D: Tensor, sigma: float, covariance_DD: Tensor) -> dict[str, Tensor]:
    """Return the state of a search that begins at a distribution."""
    es = strategy(search, mean_D.double().numpy(), sigma, 0)
    es.sm.C = np.ascontiguousarray(covariance_DD.double().numpy())
    es.sm.update_now(-1)
    return kept(es)


def ask(search: Search, state: Tensors) -> Tensor:
    """Return the next generation's candidates_PD (float32), always the same for a state; nothing changes."""
    points = restored(search, state).ask()
    return torch.tensor(np.stack(points), dtype=torch.float32)


def tell(
    search: Search, state: Tensors, candidates_PD: Tensor, scores_P: Tensor, parents: int | None = None
) -> dict[str, Tensor]:
    """Return the state after a generation; lower scores are better. The candidates may be others than were asked.

    `parents` are those that the new mean is made of, by default the better half.
    """
    es = restored(search, state, parents)
    # `cma` is told of a generation only after it was asked for one.
    es.ask()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        es.tell(list(candidates_PD.double().numpy()), scores_P.double().tolist())
    # What is sampled next is made here, so that it is not made from a state that lags behind.
    es.sm.update_now(-1)
    return kept(es)


def strategy(search: Search, mean_D: np.ndarray, sigma: float, generation: int, parents: int | None = None) -> Any:
    """Return a fresh strategy; its random numbers are those of the generation alone."""
    try:
        # It says at import that it cannot draw figures.
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            import cma
            from cma.sigma_adaptation import CMAAdaptSigmaCSA
    except ImportError:
        raise FedllmError(
            "This algorithm needs the package 'cma'; install it with pip install 'fedllm[prompts]'."
        ) from None
    random = np.random.default_rng(derive(search.seed, "generation", generation))
    options = {
        "popsize": search.population,
        "CMA_mu": parents,
        "CMA_mirrors": 0,
        "randn": lambda *shape: random.standard_normal(shape),
        "seed": float("nan"),
        "AdaptSigma": CMAAdaptSigmaCSA,
        # The change of coordinates at an extreme condition would be a state of its own.
        "conditioncov_alleviate": False,
        "verbose": -9,
    }
    return cma.CMAEvolutionStrategy(mean_D, sigma, options)


def kept(es: Any) -> dict[str, Tensor]:
    """Return all that a strategy goes on from."""
    path = es.adapt_sigma.ps if es.adapt_sigma.ps is not None else np.zeros(es.N)
    counts = [es.countiter, es.countevals, es.sm.count_tell, es.sm.last_update, es.sm.count_eigen]
    arrays = {"mean": es.mean, "C": es.sm.C, "B": es.sm.B, "D": es.sm.D, "pc": es.pc, "ps": path}
    state = {name: torch.tensor(np.array(value, dtype=np.float64, order="C")) for name, value in arrays.items()}
    state["sigma"] = torch.tensor([es.sigma], dtype=torch.float64)
    state["counts"] = torch.tensor(counts, dtype=torch.int64)
    return state


def restored(search: Search, state: Tensors, parents: int | None = None) -> Any:
    """Return the strategy that a state was kept of."""
    counts = [int(count) for count in state["counts"]]
    array = {name: value.cpu().double().numpy().copy() for name, value in state.items() if name != "counts"}
    es = strategy(search, array["mean"], float(array["sigma"][0]), counts[0], parents)
    es.sigma0 = search.sigma
    es.countiter, es.countevals = counts[0], counts[1]
    es.sm.count_tell, es.sm.last_update, es.sm.count_eigen = counts[2:]
    es.sm.C, es.sm.B, es.sm.D = array["C"], array["B"], array["D"]
    es.pc, es.adapt_sigma.ps = array["pc"], array["ps"]
    # Needed by `cma` from the second generation on, though nothing is made of them: a clock, and the mean before.
    es.timer, es.mean_old = SimpleNamespace(tic=0.0, pause=lambda: None), es.mean
    es._updateBDfromSM(es.sm)
    return es
