"""What noise is worth: epsilon at a delta for everything that was done with the same text, by Google's dp-accounting.

Two sets of text are neighbours if one of them has one more silo (or record) than the other; where a round draws a
fixed number of them, if one silo (or record) is replaced by another. Noise is said by its standard deviation over the
largest norm that one of them adds; to replace one moves a sum twice as far as to take it away.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from fedllm.core.errors import FedllmError

ORDERS = (*range(2, 65), 80, 96, 128, 256, 512)
"""Of Renyi divergence; whole numbers, since others take long or fail with sampling, and any of them is an upper bound.
"""
HOPELESS = 100.0
"""An epsilon above which a distribution of the privacy loss would take more memory than it is worth."""


class Mechanism(NamedTuple):
    """Noise of one kind, so many `times`."""

    multiplier: float
    """Standard deviation (of Laplace: scale) over the norm of what one silo or record adds."""
    sampling: Literal["none", "poisson", "fixed"] = "none"
    rate: float = 1.0
    """Of Poisson sampling."""
    size: int = 0
    """Of fixed-size sampling: so many, without replacement,"""
    of: int = 0
    """of so many."""
    times: int = 1
    noise: Literal["gaussian", "laplace"] = "gaussian"


class Epsilons(NamedTuple):
    """Upper bounds on epsilon: by Renyi divergences, by the distribution of the privacy loss, and the lower one."""

    rdp: float
    pld: float | None
    best: float


def epsilon(mechanisms: Iterable[Mechanism], delta: float) -> float:
    """Return epsilon at `delta` for all the mechanisms together, chosen adaptively; infinite without noise."""
    return epsilons(mechanisms, delta).best


def epsilons(mechanisms: Iterable[Mechanism], delta: float) -> Epsilons:
    """Return both bounds on epsilon and the better one.

    Raises:
        FedllmError: where fixed-size and Poisson sampling were mixed, which have no neighbours in common, or the
            library is not installed.
    """
    if not 0 < delta < 1:
        raise FedllmError(f"privacy.delta is {delta:g}; it must be above 0 and below 1, such as 1e-5.")
    counts: dict[Mechanism, int] = {}
    for each in mechanisms:
        if each.times and not (each.sampling == "poisson" and each.rate == 0):
            alike = each._replace(times=1)
            counts[alike] = counts.get(alike, 0) + each.times
    return bounds(tuple(sorted(each._replace(times=count) for each, count in counts.items())), delta)


@lru_cache(maxsize=4096)
def bounds(mechanisms: tuple[Mechanism, ...], delta: float) -> Epsilons:
    """Reckon `epsilons` of mechanisms that are all different."""
    if not mechanisms:
        return Epsilons(0.0, 0.0, 0.0)
    if any(not each.multiplier > 0 for each in mechanisms):
        return Epsilons(math.inf, math.inf, math.inf)
    accounting = library()
    replaced = any(each.sampling == "fixed" for each in mechanisms)
    if replaced and any(each.sampling == "poisson" for each in mechanisms):
        raise FedllmError("Privacy: fixed-size and Poisson sampling cannot be added up; use one of them throughout.")
    relation = accounting.NeighboringRelation.REPLACE_ONE if replaced else None
    accountant = accounting.rdp.RdpAccountant(ORDERS[:-2] if replaced else ORDERS, *([relation] if relation else []))
    accountant.compose(accounting.ComposedDpEvent([event(each, replaced) for each in mechanisms]))
    rdp = float(accountant.get_epsilon(delta))
    if all(each.sampling == "none" and each.noise == "gaussian" for each in mechanisms):
        # Gaussians add up to one Gaussian, for which the best epsilon is known (Balle and Wang 2018).
        whole = sum(each.times / each.multiplier**2 for each in mechanisms) ** -0.5
        exact = float(accounting.get_epsilon_gaussian(whole, delta))
        return Epsilons(rdp, exact, min(rdp, exact))
    if replaced or rdp > HOPELESS:
        return Epsilons(rdp, None, rdp)
    finer = accounting.pld.PLDAccountant(value_discretization_interval=1e-3 if rdp > 0.5 else 1e-4)
    finer.compose(accounting.ComposedDpEvent([event(each, False) for each in mechanisms]))
    pld = float(finer.get_epsilon(delta))
    return Epsilons(rdp, pld, min(rdp, pld))


def event(mechanism: Mechanism, replaced: bool) -> Any:
    """Return a mechanism in the library's words."""
    accounting = library()
    multiplier = mechanism.multiplier / (2 if replaced else 1)
    kinds = {"gaussian": accounting.GaussianDpEvent, "laplace": accounting.LaplaceDpEvent}
    once = kinds[mechanism.noise](multiplier)
    if mechanism.sampling == "poisson":
        once = accounting.PoissonSampledDpEvent(mechanism.rate, once)
    if mechanism.sampling == "fixed":
        once = accounting.SampledWithoutReplacementDpEvent(mechanism.of, mechanism.size, once)
    return accounting.SelfComposedDpEvent(once, mechanism.times)


def noise_for(target: float, delta: float, uses: Callable[[float], Iterable[Mechanism]]) -> float:
    """Return the least noise multiplier, to four digits, with which what is done has an epsilon of at most `target`.

    `uses` returns what is done with a multiplier; epsilon falls as it rises.
    """
    if not target > 0:
        raise FedllmError(f"privacy.target_epsilon is {target:g}; it must be above 0.")
    from scipy.optimize import brentq

    def over(multiplier: float) -> float:
        return epsilon(uses(multiplier), delta) - target

    low, high = 0.5, 1.0
    while over(high) > 0:
        low, high = high, 2 * high
        if high > 1e6:
            raise FedllmError(
                f"No noise reaches epsilon {target:g} at delta {delta:g}; raise privacy.target_epsilon or delta."
            )
    while over(low) <= 0 and low > 1e-3:
        low, high = low / 2, low
    high = low if over(low) <= 0 else float(brentq(over, low, high, rtol=1e-5))
    while over(high) > 0:
        high *= 1 + 2e-5
    # Written with fewer digits it must not become less.
    digits = 4 - math.ceil(math.log10(high))
    return math.ceil(high * 10**digits) / 10**digits


def library() -> Any:
    """Return Google's dp-accounting."""
    try:
        import dp_accounting
        from dp_accounting import pld, rdp  # noqa: F401
    except ImportError as error:
        raise FedllmError(
            "Differential privacy is accounted for by dp-accounting, which is not installed; "
            "install it with `pip install 'fedllm[privacy]'`."
        ) from error
    return dp_accounting
