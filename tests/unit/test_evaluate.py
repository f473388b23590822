from __future__ import annotations

import math

import pytest
import torch
from torch.nn import functional

from fedllm.core.errors import FedllmError, Interrupted
from fedllm.core.types import Request, Silo
from fedllm.silo.evaluate import Asked, each_word, held_out, summary
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import p_tuning, prefix, prompt
from fedllm.silo.scoring import calibrated, neutral_shares, word_shares
from fedllm.silo.tasks import NEUTRAL, causal, classify, instruct, word_tokens
from fedllm.silo.trainables import full, lora, trained
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=True)
ROWS = [
    {"prompt": "where?", "response": "the cat sat on the mat"},
    {"prompt": "who is it that sat on the mat?", "response": "the cat"},
    {"prompt": "hm?", "response": "é"},
]
WORDS = {"1": "positive", "0": "negative", "2": "on", "3": "on the mat"}


def a_silo(model, examples, tick=lambda tokens: None):
    return Silo("a", model, {"train": [], "test": examples}, {"kept": torch.ones(2)}, 0, tick)


def ask(client, silo, tensors=None, **scalars):
    return client(Request("a", 3, "evaluate", tensors or {}, scalars), silo)


def mean_loss(model, examples):
    total, scored = 0.0, 0
    for example in examples:
        with torch.no_grad():
            logits_TV = model(input_ids=torch.tensor([example.input_ids])).logits[0, -len(example.input_ids) :]
        labels_T = torch.tensor(example.labels)[1:]
        total += float(functional.cross_entropy(logits_TV[:-1], labels_T, ignore_index=IGNORED, reduction="sum"))
        scored += int((labels_T != IGNORED).sum())
    return total / scored, scored


def shaken(model):
    draw = torch.Generator().manual_seed(1)
    return {
        name: value.detach() + 0.1 * torch.randn(value.shape, generator=draw) for name, value in trained(model).items()
    }


@pytest.mark.parametrize(
    "trainable", [full(), lora(4), prefix(3), prompt(3), p_tuning(3, 8)], ids=lambda trainable: trainable.name
)
def test_loss_is_that_of_the_tensors_sent_and_base_that_of_before(trainable):
    task = instruct(TOKENIZER)
    examples = task.prepare(ROWS, "rows").examples
    model = trainable.attach(tiny_model(len(TOKENIZER)), 0)
    sent = shaken(model)
    client = held_out(causal_loss(), task, TOKENIZER, trainable, batch_size=2)
    reply, memory = ask(client, a_silo(model, examples), sent)
    loss, scored = mean_loss(model, examples)
    assert reply.scalars == {"loss": pytest.approx(loss, rel=1e-4), "scored": scored}
    assert (reply.client, reply.round, reply.tensors, reply.weight) == ("a", 3, {}, float(scored))
    assert memory == {"kept": memory["kept"]} and torch.equal(memory["kept"], torch.ones(2))
    assert all(torch.equal(value, sent[name]) for name, value in trained(model).items())
    assert all(value.grad is None for value in model.parameters())

    before, _ = mean_loss(tiny_model(len(TOKENIZER)), examples)
    based, _ = ask(client, a_silo(model, examples), base=1.0)
    if trainable.adapter:
        assert based.scalars["loss"] == pytest.approx(before, rel=1e-4)
        assert based.scalars["loss"] != pytest.approx(loss, rel=1e-3)
        again, _ = ask(client, a_silo(model, examples))
        assert again.scalars == reply.scalars


def test_dropout_is_off():
    trainable = lora(4, dropout=0.9)
    task = causal(TOKENIZER, block=16)
    examples = task.prepare([{"text": "the cat sat on the mat " * 9}], "rows").examples
    model = trainable.attach(tiny_model(len(TOKENIZER)), 0).train()
    client = held_out(causal_loss(), task, TOKENIZER, trainable)
    sent = shaken(model)
    first, second = (ask(client, a_silo(model, examples), sent)[0] for _ in range(2))
    assert first.scalars == second.scalars


def test_other_names_than_the_models_are_refused():
    client = held_out(causal_loss(), instruct(TOKENIZER), TOKENIZER, lora(4))
    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    with pytest.raises(FedllmError, match="odd name: 'x'"):
        ask(client, a_silo(model, []), {**shaken(model), "x": torch.ones(1)})


def test_no_held_out_text_gives_no_loss():
    client = held_out(causal_loss(), classify(TOKENIZER, words=WORDS), TOKENIZER, full())
    reply, _ = ask(client, a_silo(tiny_model(len(TOKENIZER)), []))
    assert reply.scalars == {"scored": 0.0} and reply.weight == 1.0


def test_an_interruption_passes_through():
    def stop(tokens):
        raise Interrupted

    task = instruct(TOKENIZER)
    silo = a_silo(tiny_model(len(TOKENIZER)), task.prepare(ROWS, "rows").examples, stop)
    with pytest.raises(Interrupted):
        ask(held_out(causal_loss(), task, TOKENIZER, full()), silo)
    assert torch.is_grad_enabled()


def test_each_word_takes_the_place_of_the_examples_own():
    task = classify(TOKENIZER, words=WORDS)
    words = word_tokens(TOKENIZER, task)
    assert len({len(word) for word in words}) > 1
    for label, word in WORDS.items():
        (example,) = task.prepare([{"text": "a film", "label": label}], "rows").examples
        asked = each_word(example, words)
        assert asked.rows[asked.true] == example
        assert [TOKENIZER.decode(row.input_ids) for row in asked.rows] == [
            f"a film\nLabel: {each}" for each in WORDS.values()
        ]
        assert TOKENIZER.decode(asked.words[asked.true]) == f" {word}"


def test_a_word_that_is_cut_otherwise_joins_the_choices():
    asked = each_word(Example([7, 8, 9], [IGNORED, 8, 9]), [(5,), (6, 6)])
    assert asked.words == [(5,), (6, 6), (8, 9)] and asked.true == 2


def test_accuracy_is_the_share_of_examples_whose_word_is_likeliest():
    task = classify(TOKENIZER, words=WORDS)
    texts = ["the cat", "a mat!", "é 42"]
    model = tiny_model(len(TOKENIZER))
    rows = [{"text": text, "label": label} for text in texts for label in WORDS]
    examples = task.prepare(rows, "rows").examples
    reply, _ = ask(held_out(causal_loss(), task, TOKENIZER, full(), batch_size=5), a_silo(model, examples))
    loss, scored = mean_loss(model, examples)
    assert reply.scalars["loss"] == pytest.approx(loss, rel=1e-4)
    assert reply.scalars["scored"] == reply.weight == scored
    # Every text is there once with every label, so exactly one of its rows is right.
    assert reply.scalars["accuracy"] == pytest.approx(1 / len(WORDS))


def test_accuracy_by_hand_with_words_of_several_tokens():
    task = classify(TOKENIZER, words=WORDS)
    model = tiny_model(len(TOKENIZER), seed=3)
    client = held_out(causal_loss(), task, TOKENIZER, full())
    for text in ["the cat", "a mat!", "Sure, here"]:
        chances = {}
        for label in WORDS:
            (example,) = task.prepare([{"text": text, "label": label}], "rows").examples
            loss, scored = mean_loss(model, [example])
            chances[label] = math.exp(-loss * scored)
        # " on" begins " on the mat".
        chances["2"] -= chances["3"]
        for label in WORDS:
            examples = task.prepare([{"text": text, "label": label}], "rows").examples
            reply, _ = ask(client, a_silo(model, examples))
            assert reply.scalars["accuracy"] == float(label == max(chances, key=chances.__getitem__))


def test_calibrated_accuracy_by_hand_takes_off_what_the_model_leans_to_anyway():
    """Two rows, two words; the model leans to the first word, and what is left after that is right both times."""
    words, logs = [(5,), (6,)], math.log
    asked = [Asked([Example([9, word[0]], [IGNORED, word[0]]) for word in words], words, true) for true in (0, 1)]
    sums = [logs(0.90), logs(0.05), logs(0.30), logs(0.20)]
    nothing = [logs(0.40), logs(0.10), logs(0.60), logs(0.20)]
    found = summary(asked, asked, [*sums, *nothing], len(words))
    # p_cf is the mean of (0.8, 0.2) and (0.75, 0.25): 0.947 / 0.775 > 0.053 / 0.225, but 0.6 / 0.775 < 0.4 / 0.225.
    assert found["accuracy"] == 0.5 and found["calibrated"] == 1.0
    assert found["loss"] == pytest.approx(-(logs(0.9) + logs(0.2)) / 2) and found["scored"] == 2
    assert neutral_shares([[0.8, 0.2], [0.75, 0.25]]) == pytest.approx([0.775, 0.225])
    assert calibrated([0.6, 0.4], [0.775, 0.225]) == pytest.approx([0.6 / 0.775, 0.4 / 0.225])


def test_calibration_is_on_texts_that_say_nothing_with_words_of_several_tokens():
    task = classify(TOKENIZER, words=WORDS)
    said = [TOKENIZER.decode([token for token in row.input_ids]) for row in task.neutral]
    assert [text.partition("\nLabel:")[0].removeprefix("<|im_start|>") for text in said] == list(NEUTRAL)
    assert classify(TOKENIZER).neutral == [] and classify(TOKENIZER, words=WORDS, template="{text}").neutral
    model = tiny_model(len(TOKENIZER))
    rows = [{"text": "a film", "label": label} for label in WORDS]
    examples = task.prepare(rows, "rows").examples
    client = held_out(causal_loss(), task, TOKENIZER, full())
    scalars = ask(client, a_silo(model, examples))[0].scalars
    words = word_tokens(TOKENIZER, task)

    def shares(example):
        asked = each_word(example, words)
        return word_shares([-mean_loss(model, [row])[0] * mean_loss(model, [row])[1] for row in asked.rows], words)

    usual = neutral_shares([shares(row) for row in task.neutral])
    right = [
        max(range(4), key=calibrated(shares(example), usual).__getitem__) == place
        for place, example in enumerate(examples)
    ]
    assert scalars["calibrated"] == pytest.approx(sum(right) / 4)


@pytest.mark.parametrize("trainable", [full(), lora(4), prompt(3, personal=2), prefix(3)], ids=lambda t: t.name)
def test_read_once_or_row_by_row_every_measure_is_the_same(trainable):
    task = classify(TOKENIZER, words=WORDS)
    rows = [{"text": text, "label": label} for text in ("the cat", "a mat!", "é 42 sat on it") for label in WORDS]
    examples = task.prepare(rows, "rows").examples
    model = trainable.attach(tiny_model(len(TOKENIZER), seed=3), 0)
    client = held_out(causal_loss(), task, TOKENIZER, trainable, batch_size=5)
    counts = [list[int](), list[int]()]
    once = ask(client, a_silo(model, examples, counts[0].append))[0].scalars
    inside = model.get_base_model() if hasattr(model, "get_base_model") else model
    kind = type(inside)

    class OnlyWhole(kind):
        """Like many a model of one's own: it can be given rows, and nothing that was read before them."""

        def forward(self, input_ids=None, attention_mask=None, **others):
            return super().forward(input_ids=input_ids, attention_mask=attention_mask, **others)

    inside.__class__ = OnlyWhole
    each = ask(client, a_silo(model, examples, counts[1].append))[0].scalars
    assert once == pytest.approx(each, rel=1e-4) and "calibrated" in once
    assert sum(counts[0]) < sum(counts[1])


def test_a_silos_own_is_looked_at_unless_only_the_shared_part_is_asked_for():
    trainable = prompt(3, personal=2)
    task = instruct(TOKENIZER)
    model = trainable.attach(tiny_model(len(TOKENIZER)), 0)
    first = {name: value.detach().clone() for name, value in trained(model).items()}
    sent = {name: value for name, value in first.items() if name.endswith("shared")}
    own = {name: value for name, value in first.items() if name not in sent}
    memory = {f"work/personal/{name}": value + 1 for name, value in own.items()}
    client = held_out(causal_loss(), task, TOKENIZER, trainable, first=own)
    silo = a_silo(model, task.prepare(ROWS, "rows").examples)._replace(memory=memory)
    mine, plain, new = (
        ask(client, each, sent, **asked)[0].scalars["loss"]
        for each, asked in ((silo, {}), (silo, {"shared": 1.0}), (silo._replace(memory={}), {}))
    )
    assert plain == new != mine


def test_without_words_there_is_no_accuracy():
    task = classify(TOKENIZER)
    examples = task.prepare([{"text": "the cat", "label": "cat"}], "rows").examples
    reply, _ = ask(held_out(causal_loss(), task, TOKENIZER, full()), a_silo(tiny_model(len(TOKENIZER)), examples))
    assert set(reply.scalars) == {"loss", "scored"}
