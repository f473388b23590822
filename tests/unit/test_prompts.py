"""Soft prompts: how they begin, what stays at the silo, and what an encoder at the silo sends."""

from __future__ import annotations

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.round import averaging
from fedllm.core.types import Request, Silo
from fedllm.exchange.select import everyone
from fedllm.runtime.local import local
from fedllm.runtime.spool import save_message
from fedllm.runtime.wire import reply_head
from fedllm.silo.examples import Example
from fedllm.silo.keeping import keeping, own_of
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import COMMON, p_tuning, prefix, prompt, require_room, virtual_tokens
from fedllm.silo.trainables import export, parameters, trained
from fedllm.silo.training import local_training
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXT = "Label: positive or negative?"
WIDE = TOKENIZER(TEXT, add_special_tokens=False)["input_ids"]
SHARED, OWN = "prompt_encoder.default.shared", "prompt_encoder.default.personal"
draw = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 307, (2, 7), generator=draw)
ROWS = [Example(ids, ids) for ids in torch.randint(3, 307, (6, 9), generator=draw).tolist()]
WORK = local_training(causal_loss(), 0, steps=2, batch_size=2, learning_rate=1e-2)


@torch.no_grad()
def logits(model, ids):
    return model(input_ids=ids).logits[:, -IDS.shape[1] :]


def a_silo(model, name="a", memory=None):
    return Silo(name, model, {"train": ROWS, "test": []}, memory or {}, 3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [prompt, prefix, p_tuning])
def test_begun_as_a_text_a_prompt_is_that_text_in_front(made):
    model = made(init="text", text=TEXT, tokenizer=TOKENIZER).attach(tiny_model(), 0)
    assert virtual_tokens(model) == len(WIDE)
    front = torch.tensor([WIDE]).expand(len(IDS), -1)
    torch.testing.assert_close(logits(model, IDS), logits(tiny_model(), torch.cat([front, IDS], 1)), rtol=0, atol=1e-4)


def test_a_text_is_repeated_until_there_are_enough_tokens():
    model = prompt(2 * len(WIDE) + 1, "text", TEXT, tokenizer=TOKENIZER).attach(tiny_model(), 0)
    (made,) = trained(model).values()
    assert torch.equal(made.data, tiny_model().get_input_embeddings().weight[WIDE + WIDE + WIDE[:1]])


def test_a_vocabulary_start_is_of_common_tokens_and_depends_on_the_seed_only():
    table = tiny_model().get_input_embeddings().weight
    one, again, other = (next(iter(trained(prompt(6).attach(tiny_model(), seed)).values())) for seed in (1, 1, 2))
    assert torch.equal(one, again) and not torch.equal(one, other)
    places = [int((table == row).all(1).nonzero()[0, 0]) for row in one.detach()]
    assert max(places) < COMMON and len(set(places)) > 1


def test_a_random_start_is_within_a_half():
    (made,) = trained(prompt(40, "random").attach(tiny_model(), 0)).values()
    assert made.abs().max() <= 0.5 and made.min() < -0.4 and made.max() > 0.4


@pytest.mark.filterwarnings("ignore")
def test_each_layer_of_a_prefix_is_a_tensor_of_its_own():
    params = parameters(prefix(3).attach(tiny_model(layers=4), 0))
    assert list(params) == [f"prompt_encoder.default.layers.{layer}.weight" for layer in range(4)]
    # Two heads of keys and two of values, each eight wide.
    assert {tuple(value.shape) for value in params.values()} == {(3, 32)}


@pytest.mark.parametrize(
    ("made", "reason"),
    [
        (lambda: prompt(0), "trainable.tokens is 0"),
        (lambda: prompt(personal=-1), "trainable.personal is -1"),
        (lambda: prompt(init="text", tokenizer=TOKENIZER), "trainable.text is missing"),
        (lambda: prefix(text="hm", tokenizer=TOKENIZER), "trainable.text is set but init is 'vocabulary'"),
        (lambda: prompt(2, "text", TEXT, tokenizer=TOKENIZER), f"has {len(WIDE)} tokens but trainable.tokens is 2"),
        (lambda: p_tuning(encoder="shared", init="random"), "trainable.encoder is 'shared'"),
        (lambda: prompt(512).attach(tiny_model(), 0), "prompt has 512 tokens but the model's context is 512"),
        (lambda: prefix(600).attach(tiny_model(), 0), "prompt has 600 tokens but the model's context is 512"),
        (lambda: p_tuning(600, encoder="shared").attach(tiny_model(), 0), "lower trainable.tokens"),
        (lambda: require_room(tiny_model(), 500, 13), "500 tokens and the longest text 13 but .* task.max_tokens"),
    ],
)
def test_a_prompt_that_cannot_be_is_a_sentence(made, reason):
    with pytest.raises(FedllmError, match=reason):
        made()
    require_room(tiny_model(), 500, 12)


def shared_of(model):
    return {name: value for name, value in parameters(model).items() if name != OWN}


def test_a_personal_prompt_is_trained_and_stays(tmp_path):
    model = prompt(4, personal=2).attach(tiny_model(), 0)
    first = parameters(model)
    assert {name: tuple(value.shape) for name, value in first.items()} == {SHARED: (4, 32), OWN: (2, 32)}
    work = keeping(WORK, first)
    reply, memory = work.client(Request("a", 0, "train", shared_of(model)), a_silo(model))

    # What leaves is the shared part alone: in the reply, and in the bytes of it.
    save_message(tmp_path / "reply", reply.tensors, reply_head(reply))
    assert list(load((tmp_path / "reply").read_bytes())) == [SHARED]
    own = own_of(memory)
    assert list(own) == [OWN] and (own[OWN] - first[OWN]).abs().max() > 1e-3
    assert own[OWN].numpy().tobytes() not in (tmp_path / "reply").read_bytes()

    # The next round goes on from it: the same as training both on as one.
    sent = {SHARED: first[SHARED] - reply.tensors[SHARED]}
    nearly, _ = work.client(Request("a", 1, "train", sent), a_silo(model, memory=memory))
    whole, _ = WORK.client(Request("a", 1, "train", {**sent, **own}), a_silo(model))
    assert torch.equal(nearly.tensors[SHARED], whole.tensors[SHARED])
    fresh, _ = work.client(Request("a", 1, "train", sent), a_silo(model))
    assert not torch.equal(nearly.tensors[SHARED], fresh.tensors[SHARED])


def test_two_silos_personal_prompts_go_their_own_ways_and_the_server_has_none():
    model = prompt(4, personal=2).attach(tiny_model(), 0)
    first, memory = parameters(model), {}
    algorithm = averaging(work=keeping(WORK, first), select=everyone(["a", "b"]), aggregate=mean())
    seeds = {"a": 1, "b": 2}
    exchange = local(algorithm.client, lambda name: a_silo(model, name)._replace(seed=seeds[name]), memory)
    state = algorithm.init(shared_of(model))
    for _ in range(2):
        state, report = algorithm.server(state, exchange)
    assert list(state.params) == [SHARED] and report["clients"] == 2
    assert not any(OWN in name for part in state[1:] for name in part)
    mine, others = own_of(memory["a"])[OWN], own_of(memory["b"])[OWN]
    assert not torch.equal(mine, others) and not torch.equal(mine, first[OWN])


def test_what_is_lost_is_not_remembered():
    model = prompt(4, personal=2).attach(tiny_model(), 0)
    wild = local_training(causal_loss(), 0, steps=2, batch_size=2, learning_rate=float("inf"), optimiser="sgd")
    reply, memory = keeping(wild, parameters(model)).client(Request("a", 0, "train", shared_of(model)), a_silo(model))
    assert not reply.tensors[SHARED].isfinite().all() and memory == {}


def test_a_personal_prompt_is_exported_as_one_that_peft_loads(tmp_path):
    model = prompt(4, personal=2).attach(tiny_model(), 0)
    export(model, tmp_path)
    loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    assert virtual_tokens(loaded) == 6
    torch.testing.assert_close(logits(loaded, IDS), logits(model, IDS), rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", ["MLP", "LSTM"])
def test_an_encoder_at_the_silo_sends_only_the_prompt_that_it_makes(kind):
    trainable = p_tuning(4, 8, kind=kind)
    model = trainable.attach(tiny_model(), 0)
    before = parameters(model)
    (name,) = before
    work = trainable.work(WORK)
    assert work.cohort is None
    reply, memory = work.client(Request("a", 0, "train", before), a_silo(model))
    assert list(reply.tensors) == [name] and reply.tensors[name].abs().max() > 1e-4
    assert memory and all(key.startswith("encoder/") for key in memory)
    assert list(trained(model)) == [name]
    # The encoder goes on where it was, and its round begins at the prompt that was sent.
    sent = {name: before[name] + 1}
    nearly, _ = work.client(Request("a", 1, "train", sent), a_silo(model, memory=memory))
    fresh, _ = work.client(Request("a", 1, "train", sent), a_silo(model))
    assert not torch.equal(nearly.tensors[name], fresh.tensors[name])
    still = trainable.work(local_training(causal_loss(), 0, steps=2, batch_size=2, learning_rate=0.0))
    calm, _ = still.client(Request("a", 1, "train", sent), a_silo(model, memory=memory))
    assert calm.tensors[name].abs().max() < 1e-6
    # Its gradient is the prompt's own, through the encoder: another direction than the plain prompt's.
    plain, _ = WORK.client(Request("a", 0, "train", before), a_silo(model))
    assert not torch.allclose(plain.tensors[name], reply.tensors[name], atol=1e-3)
