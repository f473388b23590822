"""Noise inside a silo: gradients of one record at a time, clipped, sampled and noised, and nothing else leaves."""

from __future__ import annotations

import math
from contextlib import ExitStack

import pytest
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Request, Silo
from fedllm.silo.dp_sgd import Guard, Room, clipped_gradients, dp_sgd, slack, summed, together
from fedllm.silo.examples import Example
from fedllm.silo.ffa import ffa_lora
from fedllm.silo.objective import causal_loss
from fedllm.silo.tasks import instruct
from fedllm.silo.trainables import full, ia3, lora, trained, write
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer(chat=True)
TEXTS = ["the cat sat on the mat", "é", "Sure, here is an answer. It is positive.", "on", "the cat", "negative"]
PAIRS = [{"prompt": f"{number}?", "response": text} for number, text in enumerate(TEXTS)]
ROWS = instruct(TOKENIZER).prepare(PAIRS, "rows").examples
SECRET = b"t" * 32
HARDLY = 1e-9
PAD = TOKENIZER.pad_token_id


def model_of(trainable):
    model = trainable.attach(tiny_model(len(TOKENIZER)), 0)
    draw = torch.Generator().manual_seed(1)
    # B is not zero, so that every gradient counts.
    params = trained(model)
    write(params, {n: v.detach() + 0.05 * torch.randn(v.shape, generator=draw) for n, v in params.items()})
    return model


def short_model(trainable):
    """The base in bfloat16, what is trained in float32."""
    full_length = model_of(trainable)
    kept = {name: value.detach().clone() for name, value in trained(full_length).items()}
    model = trainable.attach(tiny_model(len(TOKENIZER)).bfloat16(), 0)
    write(trained(model), kept)
    return model


def gradients(model, rows, clip, width):
    model.train()
    with ExitStack() as stack:
        return clipped_gradients(model, trained(model), causal_loss(), PAD, clip, Room(width), stack)(rows)


def by_hand(model, rows, clip):
    """Each record's gradient by autograd, its norm, and the clipped sum."""
    params, total = trained(model), None
    for row in rows:
        model.zero_grad()
        ids, labels = torch.tensor([row.input_ids]), torch.tensor([row.labels])
        model(input_ids=ids, labels=labels).loss.backward()
        whole = torch.cat([value.grad.flatten() for value in params.values()])
        scaled = whole * min(1.0, clip / float(whole.norm()))
        total = scaled if total is None else total + scaled
    model.zero_grad()
    return total


def flat(tensors):
    return torch.cat([value.flatten() for value in tensors.values()])


@pytest.mark.parametrize("clip", [0.05, 1e9], ids=["clipped", "not clipped"])
@pytest.mark.parametrize("width", [1, 4, 6])
def test_gradients_of_lora_are_those_of_one_record_at_a_time(width, clip):
    model = model_of(lora(4))
    expected = by_hand(model, ROWS, clip)
    assert float((flat(gradients(model, ROWS, clip, width)) - expected).norm() / expected.norm()) < 1e-5


def test_with_a_frozen_many_records_at_once_are_one_at_a_time():
    model = model_of(ffa_lora(4))
    expected = by_hand(model, ROWS, 0.05)
    assert float((flat(gradients(model, ROWS, 0.05, 4)) - expected).norm() / expected.norm()) < 1e-5


def test_other_trainables_are_worked_on_one_by_one():
    for trainable in (ia3(), full()):
        model = model_of(trainable)
        expected = by_hand(model, ROWS[:3], 0.05)
        assert float((flat(gradients(model, ROWS[:3], 0.05, 4)) - expected).norm() / expected.norm()) < 1e-5


@pytest.mark.parametrize("width", [1, 4])
def test_no_record_moves_the_sum_by_more_than_the_clip(width):
    """Brute force: each record left out in turn; other records fall into other micro-batches."""
    model, clip = model_of(lora(4)), 0.05
    whole = flat(gradients(model, ROWS, clip, width))
    for left in range(len(ROWS)):
        rest = flat(gradients(model, ROWS[:left] + ROWS[left + 1 :], clip, width))
        assert 0 < float((whole - rest).norm()) <= clip * slack(len(ROWS))


def test_in_bfloat16_a_record_moves_the_sum_by_its_own_gradient_and_nothing_else():
    """Beside others it would round otherwise: each record is computed alone, whatever micro_batch says."""
    exact = by_hand(model_of(lora(4)), ROWS, 0.05)
    model, clip = short_model(lora(4)), 0.05
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    whole = flat(gradients(model, ROWS, clip, 4))
    assert 1e-6 < float((whole - exact).norm() / exact.norm()) < 0.05
    for left in range(len(ROWS)):
        rest = flat(gradients(model, ROWS[:left] + ROWS[left + 1 :], clip, 4))
        own = flat(gradients(model, ROWS[left : left + 1], clip, 4))
        assert float((whole - rest - own).norm()) < 1e-15 and float(own.norm()) <= clip * slack(0)


def test_a_model_in_bfloat16_trains_with_noise():
    model = short_model(lora(4))
    reply = answer(model, steps=2, rate=0.5, noise=1.0)
    assert {value.dtype for value in reply.tensors.values()} == {torch.float32}
    assert torch.equal(flat(reply.tensors), flat(answer(model, steps=2, rate=0.5, noise=1.0).tensors))


def test_records_of_like_length_are_computed_together():
    rows = [Example([0] * length, []) for length in (3, 9, 2, 8, 1)]
    grouped = [[len(row.input_ids) for row in some] for some in together(rows, Room(2, 100))]
    assert grouped == [[9, 8], [3, 2], [1]]
    assert [len(some) for some in together(rows, Room(9, 9))] == [1, 1, 3]
    assert list(together([], Room(2))) == []


def test_the_node_is_told_the_tokens_of_every_step():
    told, model = list[int](), model_of(lora(4))
    silo = Silo("a", model, {"train": ROWS, "test": []}, {}, 7, told.append)
    work(steps=3, rate=1.0).client(Request("a", 0, "train", start_of(model)), silo)
    assert told == [sum(len(row.input_ids) for row in ROWS)] * 3


def test_a_gradient_that_is_not_finite_counts_as_nothing():
    one = {"a": torch.tensor([[3.0, 4.0], [math.nan, 1.0], [math.inf, 0.0]]), "b": torch.tensor([[0.0], [1.0], [1.0]])}
    assert torch.equal(summed(one, 1.0)["a"], torch.tensor([0.6, 0.8]))
    assert summed(one, 1.0)["b"].tolist() == [0.0]


def work(**settings):
    guard = Guard(SECRET, lambda records: 1.0)
    plain = {"clip": 0.1, "noise": HARDLY, "optimiser": "sgd", "learning_rate": 1.0, "rounds": 1}
    return dp_sgd(causal_loss(), PAD, guard, **{**plain, **settings})


def answer(model, rows=ROWS, number=0, seed=7, **settings):
    """The reply of a silo that was sent what the model holds, which is as before afterwards."""
    tensors = start_of(model)
    silo = Silo("a", model, {"train": rows, "test": []}, {}, seed)
    reply, memory = work(**settings).client(Request("a", number, "train", tensors), silo)
    assert memory == {}
    write(trained(model), tensors)
    return reply


def start_of(model):
    return {name: value.detach().clone() for name, value in trained(model).items()}


def test_one_step_on_all_records_is_their_clipped_mean():
    model = model_of(lora(4))
    expected = by_hand(model, ROWS, 0.1) / len(ROWS)
    # The update is start - end = the noised sum over the expected number, which is all of them.
    reply = answer(model, steps=1, rate=1.0)
    assert float((flat(reply.tensors) - expected).norm() / expected.norm()) < 1e-5


def test_the_noise_is_sigma_times_the_clip_over_the_expected_number():
    model = model_of(lora(4))
    quiet, loud = (flat(answer(model, steps=1, rate=1.0, noise=noise).tensors) for noise in (HARDLY, 50.0))
    noise = (loud - quiet).double()
    expected = 50.0 * 0.1 / len(ROWS)
    assert float(noise.std()) == pytest.approx(expected, rel=4 / math.sqrt(2 * len(noise)) + 1e-2)
    assert abs(float(noise.mean())) < 4 * expected / math.sqrt(len(noise))
    # Without a multiplier in the recipe it is what the target asks for: here 1.
    asked = flat(answer(model, steps=1, rate=1.0, noise=None).tensors)
    assert float((asked - quiet).double().std()) == pytest.approx(0.1 / len(ROWS), rel=0.1)


def test_records_are_drawn_independently_at_the_rate():
    """With a clip so small that each drawn record adds a vector of its own, what was drawn can be read off."""
    model = model_of(lora(4))
    sizes = []
    for number in range(40):
        reply = answer(model, rows=ROWS[:1] * 20, number=number, steps=1, rate=0.3, clip=1e-3)
        # Twenty equal records: the norm of the sum is their number times the clip.
        sizes.append(round(float(flat(reply.tensors).norm()) * 0.3 * 20 / 1e-3))
    mean, variance = 20 * 0.3, 20 * 0.3 * 0.7
    assert abs(sum(sizes) / 40 - mean) < 4 * math.sqrt(variance / 40)
    spread = sum((size - mean) ** 2 for size in sizes) / 40
    assert 0.4 * variance < spread < 1.9 * variance


def test_a_step_that_draws_nobody_has_noise_all_the_same():
    reply = answer(model_of(lora(4)), steps=1, rate=1e-9, noise=1.0)
    assert float(flat(reply.tensors).norm()) > 0


def test_nothing_leaves_beside_the_update():
    reply = answer(model_of(lora(4)), steps=2, rate=0.5)
    assert dict(reply.scalars) == {} and reply.weight == len(ROWS)


def test_the_same_request_has_the_same_answer_and_other_weights_other_noise():
    model = model_of(lora(4))
    settings = {"steps": 2, "rate": 0.5, "noise": 1.0}
    one, again = (flat(answer(model, **settings).tensors) for _ in range(2))
    assert torch.equal(one, again)
    others = [answer(model, number=1, **settings), answer(model, seed=8, **settings)]
    write(trained(model), {name: value + 1e-6 for name, value in start_of(model).items()})
    others.append(answer(model, **settings))
    for other in others:
        assert float(torch.corrcoef(torch.stack([one, flat(other.tensors)]))[0, 1]) < 0.2


def test_the_model_is_as_before():
    model = model_of(lora(4))
    before = dict(model.named_parameters())
    answer(model, steps=1, rate=0.5)
    assert all(value is before[name] and value.grad is None for name, value in model.named_parameters())


def test_settings_without_sense_are_sentences():
    for settings, sentence in (
        ({"clip": 0.0}, r"client\.clip is 0; it must be above 0"),
        ({"noise": 0.0}, "there is no privacy"),
        ({"rate": 1.5}, r"client\.rate is 1\.5"),
        ({"micro_batch": 0}, r"client\.micro_batch is 0"),
    ):
        with pytest.raises(FedllmError, match=sentence):
            work(**settings)
