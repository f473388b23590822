from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn import functional

from fedllm.core.errors import FedllmError
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import prefix, prompt
from fedllm.silo.scoring import (
    Scored,
    choose,
    choose_word,
    continuation,
    log_likelihoods,
    score_continuations,
)
from fedllm.silo.trainables import lora, trained
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
MODEL = tiny_model(len(TOKENIZER))
PAIRS = [
    ("Question: why?\nAnswer:", " because the cat sat"),
    ("Question: why?\nAnswer:", " é"),
    ("the", " mat"),
    ("a much longer text before it, so that rows differ in length", " on 42"),
]


def by_hand(model, example):
    ids = torch.tensor([example.input_ids])
    with torch.no_grad():
        log_probs_TV = functional.log_softmax(model(input_ids=ids).logits[0, -len(example.input_ids) :], -1)
    return sum(
        float(log_probs_TV[place - 1, token])
        for place, token in enumerate(example.labels)
        if place and token != IGNORED
    )


@pytest.mark.parametrize("batch_size", [1, 3, 16])
@pytest.mark.parametrize("trainable", [None, lora(4), prompt(3), prefix(3)], ids=lambda t: getattr(t, "name", "plain"))
def test_scores_are_those_of_one_at_a_time_by_hand(trainable, batch_size):
    model = MODEL
    if trainable:
        model = trainable.attach(tiny_model(len(TOKENIZER)), 0).eval()
        with torch.no_grad():
            for place, value in enumerate(trained(model).values()):
                value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(place)), alpha=0.1)
    asked = [continuation(TOKENIZER, *pair) for pair in PAIRS]
    scored = score_continuations(model, asked, causal_loss(), pad_id=0, batch_size=batch_size)
    for each, one in zip(scored, asked, strict=True):
        assert each.total == pytest.approx(by_hand(model, one.example), rel=1e-4)
        assert each.tokens == sum(label != IGNORED for label in one.example.labels)


def test_a_continuation_is_scored_whole_and_nothing_else():
    for before, after in PAIRS:
        example, characters = continuation(TOKENIZER, before, after)
        assert TOKENIZER.decode(example.input_ids) == before + after
        assert TOKENIZER.decode([label for label in example.labels if label != IGNORED]) == after
        assert characters == len(after) - 1
    assert len([label for label in continuation(TOKENIZER, *PAIRS[0]).example.labels if label >= 0]) > 3


def test_without_a_text_before_it_the_first_token_is_scored_too():
    example, _ = continuation(TOKENIZER, "", "the cat")
    assert TOKENIZER.decode([label for label in example.labels[1:] if label >= 0]) == "the cat"


def test_nothing_to_score_is_refused():
    with pytest.raises(FedllmError, match="cannot be scored"):
        continuation(TOKENIZER, "the cat", "")


def test_tick_counts_every_token_read():
    heard = []
    asked = [continuation(TOKENIZER, *pair).example for pair in PAIRS]
    log_likelihoods(MODEL, asked, causal_loss(), pad_id=0, batch_size=3, tick=heard.append)
    assert len(heard) == 2 and sum(heard) == sum(len(example.input_ids) for example in asked)


def test_no_continuations_no_scores():
    assert score_continuations(MODEL, [], causal_loss(), pad_id=0) == []


def test_an_example_without_scored_tokens_has_likelihood_one():
    assert log_likelihoods(MODEL, [Example([5, 6], [IGNORED] * 2)], causal_loss(), pad_id=0) == [0.0]


def test_choose_takes_the_first_of_equals_and_the_best_for_its_length():
    assert choose([Scored(-1.0, 1, 2), Scored(-2.0, 3, 4)]) == 0
    long, short = Scored(-4.0, 3, 8), Scored(-3.0, 1, 2)
    assert choose([short, long]) == 1
    assert choose([long, short], by="sum") == 1
    assert choose([Scored(-1.0, 1, 0), Scored(-2.0, 1, 1)]) == 0


def test_a_word_that_begins_another_is_not_always_chosen():
    words = [(1,), (1, 2), (1, 2, 3), (4,)]
    certain = math.log(0.9)
    assert choose_word([certain, certain - 0.01, -9.0, -5.0], words) == 1
    assert choose_word([certain, certain - 0.01, certain - 0.02, -5.0], words) == 2
    assert choose_word([certain, -9.0, -10.0, -5.0], words) == 0
    assert choose_word([-800.0, -801.0, -900.0, -1.0], words) == 3


@settings(max_examples=50, deadline=None)
@given(st.lists(st.floats(-50, 0), min_size=1, max_size=6))
def test_words_of_which_none_begins_another_are_chosen_by_plain_sum(totals):
    words = [(place, *range(place)) for place in range(len(totals))]
    # Differences below a float's precision at the top of the range may tie, so compare the values.
    assert totals[choose_word(totals, words)] == pytest.approx(max(totals), abs=1e-12)


@settings(max_examples=50, deadline=None)
@given(st.data())
def test_choose_word_is_the_likeliest_end_of_a_walk_down_the_words(data):
    """With the model forced to say one of the words, each end has what its branches leave."""
    words = [(0,), (0, 1), (0, 1, 2), (0, 3), (4,), (4, 5)]
    shares = data.draw(st.lists(st.floats(0.01, 1), min_size=len(words), max_size=len(words)))
    ends = [share / sum(shares) for share in shares]
    reached = [sum(end for end, other in zip(ends, words, strict=True) if other[: len(word)] == word) for word in words]
    chosen = choose_word([math.log(each) for each in reached], words)
    assert ends[chosen] == pytest.approx(max(ends))
