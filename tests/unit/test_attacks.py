"""The attacks against numbers by hand, and against text that they must find and noise in which they must not."""

from __future__ import annotations

import math

import pytest
import torch
from scipy.stats import binom, binomtest

from fedllm.audit.bounds import chance_of, epsilon_from_one_run
from fedllm.audit.exposure import candidates, chance, exposure, from_coins, standing
from fedllm.audit.intervals import auc, auc_estimate, clopper_pearson, mean_estimate, tpr_at
from fedllm.audit.layers import readings
from fedllm.audit.membership import by_least, by_reference, token_scores
from fedllm.audit.origin import attributed, lowest
from fedllm.audit.recovery import by_frequency, rouge_l, token_recall
from fedllm.audit.rows import likeliest, row_scores
from fedllm.audit.span import span_distances, span_text
from fedllm.silo.examples import Example, collate
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import full, lora, trained
from tests.tiny import tiny_model

TEXT = [1, 40, 77, 120, 40, 260, 9, 301, 88]


def update_of(model, text):
    """What one plain step on one text sends."""
    params = trained(model)
    for value in params.values():
        value.grad = None
    causal_loss()(model, collate([Example(text, text)], 0, torch.device("cpu"))).sum().backward()
    return {
        name: torch.zeros_like(value) if value.grad is None else value.grad.clone() for name, value in params.items()
    }


def with_b(model):
    """LoRA whose factors B are not 0, as after a first round."""
    for name, value in trained(model).items():
        if ".lora_B." in name:
            value.data.normal_(0, 0.05, generator=torch.Generator().manual_seed(1))
    return model


def test_auc_is_the_share_of_pairs_in_the_right_order():
    # 3 > 2, 1; 1.5 > 1 and not 2: three of four pairs.
    assert auc([3.0, 1.5], [2.0, 1.0]) == 0.75
    assert auc([1.0, 1.0], [1.0]) == 0.5
    found = auc_estimate([3.0, 2.5, 4.0] * 10, [2.0, 1.0, 2.6] * 10, 0)
    assert found.low < found.value < found.high and found.n == 60


def test_intervals_of_rates_are_those_of_scipy():
    for hits, trials in ((0, 10), (3, 10), (10, 10), (1, 200)):
        exact = binomtest(hits, trials).proportion_ci(0.95, method="exact")
        assert clopper_pearson(hits, trials) == pytest.approx((exact.low, exact.high), abs=1e-12)


def test_the_rate_at_few_false_alarms_allows_as_many_as_it_says():
    others = list(range(100))
    # One of a hundred may be above: the threshold is the second highest, 98.
    assert tpr_at([98.0, 98.5, 200.0, 3.0], others).value == 0.5
    assert tpr_at([98.0, 98.5, 200.0, 3.0], others[:50]).value == 0.75


def test_a_mean_has_an_interval_that_shrinks():
    few, many = mean_estimate([0.0, 1.0] * 4, 0), mean_estimate([0.0, 1.0] * 100, 0)
    assert few.value == many.value == 0.5 and many.high - many.low < few.high - few.low


def test_rouge_l_by_hand():
    # "b d" is the longest common subsequence: 2 * 2 / (3 + 4).
    assert rouge_l([2, 9, 4], [1, 2, 3, 4]) == pytest.approx(4 / 7)
    assert rouge_l([], [1]) == 0 and rouge_l([1, 2], [1, 2]) == 1


def test_a_guess_names_no_more_tokens_than_the_text_has():
    assert token_recall([1, 2, 3, 4, 5, 6], [6, 5, 6]) == 0
    assert token_recall(by_frequency([[5, 5, 6], [6, 5]]), [6, 5, 6]) == 1


def test_min_k_takes_the_least_likely_tokens():
    assert by_least([-1.0, -9.0, -2.0, -3.0, -5.0], 0.2) == -9
    assert by_least([-1.0], 0.2) == -1
    assert by_reference([-1.0, -3.0], [-2.0, -6.0]) == 2


def test_token_scores_are_the_objectives():
    model = tiny_model()
    rows = [Example(TEXT, [-100, *TEXT[1:]]), Example(TEXT[:4], [-100, -100, *TEXT[2:4]])]
    found = token_scores(model, rows, 0, batch_size=1)
    sums = causal_loss()(model, collate(rows, 0, torch.device("cpu")))
    assert [-sum(each) for each in found] == pytest.approx(sums.tolist(), abs=1e-4)
    assert list(map(len, found)) == [8, 2]


def test_exposure_by_hand():
    assert exposure(-1.0, [-2.0] * 7) == 3
    # Two are likelier: rank 3 of 8.
    assert exposure(-1.0, [-0.5, -0.7, *[-2.0] * 5]) == pytest.approx(3 - math.log2(3))
    assert exposure(-1.0, [-1.0]) == 0, "a secret that is no likelier than another is no exposed one"


def test_chance_is_the_mean_over_all_ranks():
    assert chance(8) == pytest.approx(sum(3 - math.log2(rank) for rank in range(1, 9)) / 8)
    assert chance(2**20) == pytest.approx(1 / math.log(2), abs=1e-4)


def test_candidates_are_other_secrets_of_the_same_form():
    found = candidates("0042", 50, 3)
    assert len(set(found)) == 50 and "0042" not in found and all(len(each) == 4 for each in found)


def test_the_bound_from_one_run_is_the_coin_that_is_too_unlikely():
    # Without delta, 20 of 20 right: q^20 = 0.05 with q = e^eps / (1 + e^eps).
    rate = 0.05 ** (1 / 20)
    assert epsilon_from_one_run(20, 20, 20, 0.0) == pytest.approx(math.log(rate / (1 - rate)), abs=1e-6)
    assert epsilon_from_one_run(20, 20, 12, 0.0) == 0
    assert chance_of(20, 20, 15, 1.0, 0.0) == pytest.approx(binom.sf(14, 20, 1 / (1 + math.exp(-1))))
    assert epsilon_from_one_run(20, 20, 20, 1e-3) < epsilon_from_one_run(20, 20, 20, 0.0)


def test_a_bound_does_not_exceed_the_epsilon_of_a_mechanism_that_is_known():
    """Randomised response with epsilon 1 keeps its promise, nearly always: the bound is at 95 % confidence."""
    draw, broken = torch.Generator().manual_seed(0), 0
    for _ in range(40):
        right = int((torch.rand(60, generator=draw) < 1 / (1 + math.exp(-1))).sum())
        broken += epsilon_from_one_run(60, 60, right, 0.0) > 1
    assert broken <= 5


def test_coins_are_guessed_by_thirds():
    planted = [True, False] * 6
    stands = [5.0 + place if each else -place for place, each in enumerate(planted)]
    told = from_coins(stands, planted, 1e-5)
    assert (told.guesses, told.right) == (8, 8) and told.epsilon == told.most > 0
    assert from_coins([-each for each in stands], planted, 1e-5).epsilon == 0
    assert standing(3.0, [1.0, 3.0]) == 1


@pytest.mark.parametrize("kind", ["full", "lora"])
def test_a_text_is_read_out_of_one_plain_step_to_the_last_but_one(kind):
    torch.manual_seed(0)
    model = full().attach(tiny_model(), 0) if kind == "full" else with_b(lora(r=8).attach(tiny_model(), 0))
    update = update_of(model, TEXT)
    away_V = span_distances(model, update, len(TEXT))
    named = likeliest(away_V)
    read = set(TEXT[:-1])
    assert set(named[: len(read)]) == read, "the last token is read by nobody"
    assert away_V[named[len(read) - 1]] < 1e-4 < 0.1 < away_V[named[len(read)]]
    assert span_text(model, update, named[: len(set(TEXT))], len(TEXT)) == TEXT[:-1]


def test_the_length_of_an_update_does_not_matter_and_its_noise_does():
    model = full().attach(tiny_model(), 0)
    update = update_of(model, TEXT)
    small = {name: value * 1e-6 for name, value in update.items()}
    named = likeliest(span_distances(model, small, len(TEXT)))
    assert token_recall(named, TEXT) == 7 / 8
    draw = torch.Generator().manual_seed(0)
    whole = math.sqrt(sum(float(value.norm()) ** 2 for value in update.values()))
    noised = {n: v / whole + 0.7 * torch.randn(v.shape, generator=draw) for n, v in update.items()}
    texts = [TEXT, [2, 5, 30, 31, 200, 201, 202, 203]]
    for attack in (span_distances(model, noised, len(TEXT)), row_scores(model, noised)):
        assert token_recall(likeliest(attack), texts[0]) <= 0.25


def test_an_update_that_says_nothing_names_nothing():
    model = lora(r=4).attach(tiny_model(), 0)
    update = update_of(model, TEXT)
    # As long as B is 0 the factors A have no gradient.
    assert span_distances(model, update, 9) is None and row_scores(model, update) is None
    assert span_text(model, update, TEXT, 9) == []
    assert readings(model, {"other": torch.zeros(2, 2)}) == []


def test_rows_that_moved_are_the_tokens_of_the_text():
    model = tiny_model()
    model.config.tie_word_embeddings = False
    model.lm_head.weight = torch.nn.Parameter(model.lm_head.weight.detach().clone())
    full().attach(model, 0)
    scores_V = row_scores(model, update_of(model, TEXT))
    assert set(scores_V.nonzero().flatten().tolist()) == set(TEXT[:-1])
    assert set(likeliest(scores_V)[:7]) == set(TEXT[:-1])


@pytest.mark.parametrize("signs", [False, True])
def test_shared_rows_and_signs_alone_name_most_tokens(signs):
    model = full().attach(tiny_model(), 0)
    update = update_of(model, TEXT)
    if signs:
        update = {name: value.sign() for name, value in update.items()}
    assert token_recall(likeliest(row_scores(model, update)), TEXT) >= 0.6


def test_updates_are_given_to_the_silo_that_points_the_same_way():
    known = {"a": {"w": torch.tensor([1.0, 0.0])}, "b": {"w": torch.tensor([0.0, 2.0])}}
    later = {"a": {"w": torch.tensor([9.0, 1.0])}, "b": {"w": torch.tensor([0.1, 0.2])}}
    assert attributed(known, later) == {"a": "a", "b": "b"}
    assert lowest({"a": [1.0, 5.0], "b": [2.0, 4.0]}) == ["a", "b"]
