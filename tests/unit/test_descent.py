"""Gradient matching against training's own gradients, finite differences, and texts that it must and must not find."""

from __future__ import annotations

import random

import pytest
import torch

from fedllm.audit.descent import Effort, descend
from fedllm.audit.matching import cosines, gradients, mismatch, offers, seen, shares, supposed, table
from fedllm.audit.moves import moved, rearranged
from fedllm.audit.recovery import rouge_l, token_recall
from fedllm.silo.trainables import full, lora
from tests.tiny import tiny_model
from tests.unit.test_attacks import TEXT, update_of, with_b

SCORED = [False, *[True] * (len(TEXT) - 1)]
CANDIDATES = [*dict.fromkeys(TEXT), 5, 17, 33, 64, 99, 150, 200, 305]
TRUE = [CANDIDATES.index(token) for token in TEXT]


def attacked(kind="full", change=lambda value: value):
    """A tiny model and what one step on the text makes of it."""
    model = full().attach(tiny_model(), 0) if kind == "full" else with_b(lora(r=4).attach(tiny_model(), 0))
    return model, {name: change(value) for name, value in update_of(model, TEXT).items()}


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_the_true_text_makes_the_update_and_no_other_does(kind):
    model, update = attacked(kind, lambda value: 1e-3 * value)
    at = seen(model, update, CANDIDATES, SCORED)
    assert not at.signs and supposed(at, [TRUE])[0][0] == pytest.approx(0, abs=1e-5)
    assert supposed(at, [[*TRUE[:-1], TRUE[0]]])[0][0] > 1e-3, "the last token is a label"
    assert supposed(at, [[TRUE[1], TRUE[0], *TRUE[2:]]])[0][0] > 1e-3


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_through_embeddings_are_those_of_training(tied):
    model = tiny_model()
    if not tied:
        model.config.tie_word_embeddings = False
        model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    full().attach(model, 0)
    update = update_of(model, TEXT)
    at = seen(model, update, CANDIDATES, SCORED)
    one_hot = torch.nn.functional.one_hot(torch.tensor(TRUE), len(CANDIDATES)).float()
    made = gradients(at, table(at)[TRUE], one_hot)
    # Training takes the mean over labels, or their sum: the same up to one factor.
    scale = float(update["model.norm.weight"].norm() / made["model.norm.weight"].detach().norm())
    for name, value in update.items():
        torch.testing.assert_close(scale * made[name].detach(), value, rtol=1e-3, atol=1e-4 * float(value.abs().max()))


@pytest.mark.parametrize("signs", [False, True])
def test_the_slope_of_the_mismatch_is_that_of_finite_differences(signs):
    model, update = attacked(change=torch.sign if signs else lambda value: value)
    at = seen(model, update, CANDIDATES, SCORED)
    draw, table_CI = torch.Generator().manual_seed(0), table(at)
    start_TI = table_CI[TRUE] + 0.1 * torch.randn(len(TEXT), table_CI.shape[1], generator=draw)
    # Smooth signs hold the mean size of the gradient fast, so only the plain loss has the slope of its values.
    at = at._replace(signs=False)

    def loss(x_TI):
        return mismatch(at, gradients(at, x_TI, shares(x_TI, table_CI, 0.2)))

    x_TI = start_TI.clone().requires_grad_()
    (slope_TI,) = torch.autograd.grad(loss(x_TI), x_TI)
    along_TI = slope_TI / slope_TI.norm()
    up, down = (float(loss(start_TI + step * along_TI).detach()) for step in (3e-3, -3e-3))
    assert (up - down) / 6e-3 == pytest.approx(float(slope_TI.norm()), rel=0.03)


def test_a_cosine_loss_by_hand():
    model, update = attacked()
    at = seen(model, update, CANDIDATES, SCORED)
    # Between (1, 0) and (3, 4) the cosine is 3 / 5; opposite ones are 2 apart; their mean is (0.4 + 2) / 2.
    at = at._replace(update={"a": torch.tensor([3.0, 4.0]), "b": torch.tensor([1.0])})
    assert float(mismatch(at, {"a": torch.tensor([1.0, 0.0]), "b": torch.tensor([-7.0])})) == pytest.approx(1.2)
    # As signs (1, 1) is 7 / (5 * sqrt(2)) from it.
    signs = mismatch(at._replace(signs=True), {"a": torch.tensor([9.0, 0.1]), "b": torch.tensor([2.0])})
    assert float(signs) == pytest.approx((1 - 7 / 50**0.5) / 2, abs=1e-6)


def test_shares_are_even_when_hot_and_one_tokens_when_cold():
    at = seen(*attacked(), CANDIDATES, SCORED)
    table_CI = table(at)
    assert shares(table_CI[TRUE], table_CI, 1e-3).argmax(-1).tolist() == TRUE
    assert float(shares(table_CI[TRUE], table_CI, 1e-3).max(-1).values.min()) > 0.99
    assert float(shares(table_CI[TRUE], table_CI, 1e3).max()) < 1.1 / len(CANDIDATES)
    assert cosines(2 * table_CI[TRUE], table_CI).argmax(-1).tolist() == TRUE


def test_moves_lose_no_token_and_a_replacement_is_an_offered_one():
    draw, text = random.Random(0), [(token, place) for place, token in enumerate([4, 4, 7, 8, 9])]
    for _ in range(300):
        assert sorted(moved(text, [], draw)) == text
        found = moved(text, [(2, 1)], draw)
        assert sorted(found) == text or found == [*text[:2], (1, None), *text[3:]]


def test_a_swapped_pair_is_put_back_and_the_right_token_offered_for_a_wrong_one():
    at = seen(*attacked(), CANDIDATES, SCORED)

    def score(texts):
        return [apart for apart, _ in supposed(at, texts)]

    swapped = [*TRUE]
    swapped[2], swapped[5] = swapped[5], swapped[2]
    found = rearranged(swapped, [], score, 10, random.Random(0))
    assert list(found.tokens) == TRUE and found.score == pytest.approx(0, abs=1e-5)
    assert [swapped[place] for place in found.came] == TRUE
    wrong = [*TRUE]
    wrong[3] = CANDIDATES.index(200)
    offered = offers(at, wrong, 30)
    assert min(offered, key=lambda one: score([[*wrong[: one[0]], one[1], *wrong[one[0] + 1 :]]])) == (3, TRUE[3])


SHORT = [1, 40, 77, 120, 260]
AMONG = [33, 260, 5, 40, 99, 1, 120, 64, 77, 17]
QUICK = Effort(steps=12, turns=3, rounds=4, drawn=64, starts=4)


def recovered(change, seeds=2):
    """Mean recall and ROUGE-L of quick descents; half of the candidates are in the text."""
    model = full().attach(tiny_model(), 0)
    update = {name: change(value) for name, value in update_of(model, SHORT).items()}
    texts = [descend(model, update, AMONG, [False, *[True] * 4], seed, QUICK) for seed in range(seeds)]
    recalls = [token_recall(list(dict.fromkeys(text)), SHORT) for text in texts]
    return sum(recalls) / seeds, sum(rouge_l(text, SHORT) for text in texts) / seeds


@pytest.mark.parametrize("change", [lambda value: 0.01 * value, torch.sign], ids=["plain", "signs"])
def test_a_short_text_is_recovered_beyond_chance(change):
    recall, order = recovered(change)
    assert recall > 0.75 and order > 0.7


def test_noise_brings_a_descent_to_chance():
    draw = torch.Generator().manual_seed(0)
    recall, order = recovered(
        lambda value: value / value.norm().clamp(min=1e-9) + 3 * torch.randn(value.shape, generator=draw)
    )
    assert recall <= 0.7 and order <= 0.5


def test_the_same_seed_finds_the_same_and_the_model_is_left_as_it_was():
    model, update = attacked()
    before = {name: value.detach().clone() for name, value in model.named_parameters()}
    few = Effort(steps=4, turns=2, rounds=1, drawn=2)
    assert descend(model, update, CANDIDATES, SCORED, 7, few) == descend(model, update, CANDIDATES, SCORED, 7, few)
    assert all(torch.equal(value, before[name]) for name, value in model.named_parameters())


def test_nothing_is_made_of_an_update_that_says_nothing():
    model, update = attacked()
    nothing = {name: torch.zeros_like(value) for name, value in update.items()}
    broken = {name: torch.full_like(value, torch.nan) for name, value in update.items()}
    for case in (nothing, broken, {}):
        assert descend(model, case, CANDIDATES, SCORED, 0) is None
    assert descend(model, update, CANDIDATES, [True, *[False] * 8], 0) is None
    assert descend(model, update, [5], SCORED, 0) is None
