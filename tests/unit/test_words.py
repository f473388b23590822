"""Words scored from what their text has in common have the scores of every text and word read on its own."""

from __future__ import annotations

import pytest
import torch

from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import p_tuning, prefix, prompt
from fedllm.silo.reading import read, read_vectors
from fedllm.silo.scoring import log_likelihoods
from fedllm.silo.trainables import lora, trained
from fedllm.silo.words import Contexts, word_scores
from tests.tiny import tiny_model

WORDS = [(7,), (7, 8), (9, 10, 11), (9, 12), (30,), (9, 10, 13)]
TEXTS = [[5, 6, 20, 21, 22], [5, 6, 40], [5, 6, 41, 42, 43, 44, 45, 46], [5, 6, 50, 51]]


def one_by_one(model, texts, words):
    rows = [Example([*text, *word], [IGNORED] * len(text) + list(word)) for text in texts for word in words]
    sums = log_likelihoods(model, rows, causal_loss(), pad_id=0, batch_size=1)
    return torch.tensor(sums).view(len(texts), len(words))


def shaken(trainable):
    model = tiny_model(100) if trainable is None else trainable.attach(tiny_model(100), 0).eval()
    with torch.no_grad():
        for place, value in enumerate(trained(model).values()):
            value.add_(torch.randn(value.shape, generator=torch.Generator().manual_seed(place)), alpha=0.1)
    return model


@pytest.mark.parametrize("batch_size", [1, 3])
@pytest.mark.parametrize(
    "trainable", [None, lora(4), prompt(3), prefix(3), p_tuning(3)], ids=lambda t: getattr(t, "name", "plain")
)
def test_words_score_as_rows_of_their_own(trainable, batch_size):
    model = shaken(trainable)
    found = word_scores(model, Contexts(TEXTS, [WORDS] * 4), pad_id=0, batch_size=batch_size)
    assert torch.tensor(found) == pytest.approx(one_by_one(model, TEXTS, WORDS), abs=2e-4)


@pytest.mark.parametrize("trainable", [lora(4), prompt(3)], ids=lambda t: t.name)
def test_the_base_inside_an_adapter_scores_as_the_base(trainable):
    model = shaken(trainable)
    with model.disable_adapter():
        found = word_scores(model, Contexts(TEXTS, [WORDS] * 4), pad_id=0)
    assert torch.tensor(found) == pytest.approx(one_by_one(tiny_model(100), TEXTS, WORDS), abs=2e-4)


def test_texts_after_different_beginnings_score_as_whole_texts():
    model, heads = tiny_model(100), [[5, 6, 70], [5, 6]]
    _, before = read(model, heads, None, 0, 0)
    tails = [text[2:] for text in TEXTS]
    contexts = Contexts(tails * 2, [WORDS] * 8, [0] * 4 + [1] * 4)
    found = word_scores(model, contexts, pad_id=0, before=before, batch_size=3)
    whole = [[*head, *tail] for head in heads for tail in tails]
    assert torch.tensor(found) == pytest.approx(one_by_one(model, whole, WORDS), abs=2e-4)
    assert before.seen_RT.shape == (2, 3), "what was read must stay as it was"


def test_soft_prompts_score_as_peft_has_them():
    model = shaken(prompt(3))
    (vectors_TH,) = trained(model).values()
    before = read_vectors(model, torch.stack([vectors_TH.detach() * 0, vectors_TH.detach()]))
    contexts = Contexts(TEXTS, [WORDS] * 4, [1] * 4)
    found = word_scores(model, contexts, pad_id=0, before=before)
    assert torch.tensor(found) == pytest.approx(one_by_one(model, TEXTS, WORDS), abs=2e-4)


def test_a_text_is_read_once_for_all_its_words():
    heard = []
    word_scores(tiny_model(100), Contexts(TEXTS, [[(7,), (8,)]] * 4), pad_id=0, tick=heard.append)
    assert sum(heard) == sum(map(len, TEXTS))
