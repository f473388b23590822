"""Noise at the server: what one silo can do to the sum, that the noise is there, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.plan import plan
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Work
from fedllm.exchange.central_dp import central_dp
from fedllm.exchange.clip import clip
from fedllm.exchange.quantise import quantise
from fedllm.exchange.server_noise import Around, slack
from fedllm.exchange.top_k import top_k

PARAMS = {"a": torch.zeros(40, 5), "b": torch.zeros(300)}
SECRET = b"t" * 32
NORM = 0.7
HARDLY = 1e-12
"""Noise that leaves no trace in float32 of what it is added to, but is drawn like any other."""


def algorithm(names, noise=HARDLY, transforms=None, expected=None, weights="uniform", secret=SECRET):
    """The round over these silos; what they reply comes with the exchange."""
    part = central_dp(Around(secret, expected or len(names) or 1), NORM, noise)
    return averaging(
        work=Work(None),
        select=lambda number: names,
        aggregate=mean(weights),
        transforms=[part] if transforms is None else [part if each is None else each for each in transforms],
    )


def telling(updates, weight=1.0):
    """An exchange that replies with these updates, as a silo would that obeys nothing."""
    return lambda requests: (
        Reply(request.client, request.round, updates[request.client], weight)
        for request in requests
        if request.client in updates
    )


def wild(count, seed=0):
    draw = torch.Generator().manual_seed(seed)
    sizes = [10.0 ** float(torch.randint(-4, 6, (), generator=draw)) for _ in range(count)]
    return {
        f"s{place}": {name: size * torch.randn(value.shape, generator=draw) for name, value in PARAMS.items()}
        for place, size in enumerate(sizes)
    }


def after(names, updates, **settings):
    made = algorithm(names, **settings)
    return made.server(made.init(PARAMS), telling(updates))[0]


def flat(state):
    return torch.cat([value.flatten() for value in state.params.values()]).double()


def test_no_silo_moves_the_result_by_more_than_its_share():
    """Brute force: each of the silos left out in turn, with updates of all sizes, none of which was clipped."""
    expected = 4.0
    for seed in range(5):
        updates = wild(6, seed)
        names = list(updates)
        whole = flat(after(names, updates, expected=expected))
        for left in names:
            others = [name for name in names if name != left]
            # Whether it was not asked, did not answer, or is of the wrong shape: its part is missing, no more.
            missing = [
                after(others, updates, expected=expected),
                after(names, {name: updates[name] for name in others}, expected=expected),
                after(names, {**updates, left: {"a": torch.zeros(1)}}, expected=expected),
            ]
            for each in missing:
                moved = float((whole - flat(each)).norm())
                assert moved <= NORM * slack(expected) / expected
                assert moved > 0


def test_a_weight_counts_for_nothing():
    updates = wild(3)
    heavy = algorithm(list(updates))
    state = heavy.server(heavy.init(PARAMS), telling(updates, weight=1e6))[0]
    assert torch.equal(flat(state), flat(after(list(updates), updates)))


@pytest.mark.parametrize("names", [[], ["s0"], ["s0", "s1", "s2"]], ids=len)
def test_the_noise_is_what_the_paper_says_also_when_nobody_comes(names):
    """Standard deviation z S / (q W) on each value of the average, McMahan et al. 2018, algorithm 1."""
    values = {"w": torch.zeros(100_000)}
    made = algorithm(names, noise=2.0, expected=5.0)
    still = {name: values for name in names}
    state, _ = made.server(made.init(values), telling(still))
    moved = state.params["w"].double()
    expected = 2.0 * NORM / 5.0 * slack(5.0)
    assert float(moved.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * 100_000))
    assert abs(float(moved.mean())) < 4 * expected / math.sqrt(100_000)
    assert slack(5.0) < 1.001


def test_a_round_whose_only_silo_sends_nonsense_ends_with_noise_and_one_without_an_answer_is_repeated():
    made = algorithm(["s0"], noise=1.0)
    state, report = made.server(made.init(PARAMS), telling({"s0": {"a": torch.full((40, 5), math.nan)}}))
    assert report["clients"] == 0 and "dropped.s0" in report and float(flat(state).abs().max()) > 0
    with pytest.raises(FedllmError, match="no usable update"):
        made.server(made.init(PARAMS), telling({}))


def test_the_same_round_again_has_the_same_noise_and_another_sum_its_own():
    updates = wild(3)
    names = list(updates)
    one, again = (after(names, updates, noise=1.0) for _ in range(2))
    assert torch.equal(flat(one), flat(again))
    assert all(torch.equal(one.transforms[name], value) for name, value in again.transforms.items())
    # One silo less: were the noise the same, the difference would be that silo's update without any.
    fewer = after(names, {name: updates[name] for name in names[1:]}, noise=1.0)
    assert float((flat(one) - flat(fewer)).norm()) > 3 * NORM / 3
    other = after(names, updates, noise=1.0, secret=b"u" * 32)
    assert float((flat(one) - flat(other)).norm()) > 3 * NORM / 3
    marks = {bytes(each.transforms[next(iter(each.transforms))].tolist()) for each in (one, fewer, other)}
    assert len(marks) == 3


def test_what_is_planned_says_the_noise():
    steps = plan(algorithm(["a", "b"], noise=1.5), PARAMS).steps
    last = steps[-1].facts
    assert (last.norm_bound, last.noise, last.even) == (NORM, 1.5, True)
    assert all(step.facts.noise is None for step in steps[:-2])


def test_a_codec_after_the_noise_transform_is_fine_since_the_server_clips_what_it_decodes():
    for codec in (quantise(4), top_k(0.1)):
        assert plan(algorithm(["a"], transforms=[None, codec]), PARAMS).steps[-1].facts.noise == HARDLY


REFUSED = [
    ({"weights": "examples"}, r"needs a plain mean in which every silo counts alike.*'uniform'"),
    ({"transforms": [quantise(8), None]}, r"a codec before it undoes the clip at the server; put it first"),
    ({"transforms": [None, None]}, r"adds noise a second time; keep one"),
]


@pytest.mark.parametrize(("settings", "sentence"), REFUSED, ids=["weights", "codec", "twice"])
def test_what_would_break_the_guarantee_cannot_be_planned(settings, sentence):
    with pytest.raises(FedllmError, match=sentence):
        plan(algorithm(["a", "b"], **settings), PARAMS)


def test_a_tighter_clip_elsewhere_does_no_harm():
    assert plan(algorithm(["a"], transforms=[clip(0.1), None]), PARAMS).steps[-1].facts.norm_bound == 0.1


def test_settings_without_sense_are_sentences():
    for settings, sentence in (
        ({"max_norm": 0.0, "noise": 1.0}, "max_norm is 0; it must be above 0"),
        ({"max_norm": 1.0}, r"has no 'noise'; set it .* or set privacy.target_epsilon"),
        ({"max_norm": 1.0, "noise": 0.0}, "there is no privacy"),
    ):
        with pytest.raises(FedllmError, match=sentence):
            central_dp(Around(SECRET, 1.0), **settings)


def test_weights_in_short_floats_are_refused_when_it_is_planned():
    with pytest.raises(FedllmError, match="keep what is trained in float32"):
        plan(algorithm(["a"]), {"w": torch.zeros(3, dtype=torch.bfloat16)})
