"""A cohort trains many clients as one batch and gives what the clients give one by one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Request, Silo
from fedllm.silo.cohort import stackable, stacked
from fedllm.silo.ffa import ffa_lora
from fedllm.silo.keeping import keeping
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import p_tuning, prefix, prompt
from fedllm.silo.tasks import instruct
from fedllm.silo.trainables import dora, full, ia3, lora, peft_method, trained, write
from fedllm.silo.training import local_training
from fedllm.silo.width import cohort_width
from tests.tiny import tiny_model, tiny_tokenizer

STORIES = Path(__file__).resolve().parents[3] / "shared" / "data" / "models" / "stories260k"
TOKENIZER = tiny_tokenizer(chat=True)
TEXTS = [
    {"prompt": "where?", "response": "the cat sat on the mat"},
    {"prompt": "who sat on the mat, and who sat under it the whole time?", "response": "the cat"},
    {"prompt": "hm", "response": "é"},
    {"prompt": "how was the answer?", "response": "Sure, here is an answer. It is positive, then negative."},
    {"prompt": "", "response": "on"},
]


def silos(model, tokenizer=TOKENIZER, sizes=(5, 2, 3, 4)):
    """Silos of unequal size whose rows have unequal length; each starts elsewhere in the texts."""
    rows = instruct(tokenizer).prepare(TEXTS * 2, "rows").examples
    return [
        Silo(f"s{place}", model, {"train": rows[place : place + size], "test": []}, {}, 100 + place)
        for place, size in enumerate(sizes)
    ]


def shaken(model, seed):
    """Parameters that each client starts from: B is not zero, so that every gradient counts."""
    draw = torch.Generator().manual_seed(seed)
    return {
        name: value.detach() + 0.05 * torch.randn(value.shape, generator=draw) for name, value in trained(model).items()
    }


def both_ways(work, members):
    return [work.client(*member)[0] for member in members], [reply for reply, _ in work.cohort(members)]


def furthest(alone, together):
    assert [(r.client, r.round, r.weight) for r in alone] == [(r.client, r.round, r.weight) for r in together]
    for one, other in zip(alone, together, strict=True):
        assert one.tensors.keys() == other.tensors.keys() and one.scalars["tokens"] == other.scalars["tokens"]
        assert one.scalars["train_loss"] == pytest.approx(other.scalars["train_loss"], abs=1e-5)
        assert all(one.tensors[name].abs().max() > 0 for name in one.tensors)
    return max(
        float((one.tensors[name] - other.tensors[name]).abs().max())
        for one, other in zip(alone, together, strict=True)
        for name in one.tensors
    )


SGD = {"optimiser": "sgd", "learning_rate": 0.1}
ADAMW = {"optimiser": "adamw", "learning_rate": 1e-3, "weight_decay": 0.1}


@pytest.mark.parametrize(
    "settings",
    [
        {**SGD, "steps": 3, "batch_size": 4, "max_grad_norm": 0},
        {**SGD, "steps": 3, "batch_size": 4, "max_grad_norm": 0.5},
        {**SGD, "steps": 2, "batch_size": 4, "micro_batch": 2},
        {**SGD, "steps": 2, "batch_size": 5, "micro_batch": 2, "max_grad_norm": 0},
        {**SGD, "epochs": 2, "batch_size": 2},
        {**SGD, "epochs": 0.7, "batch_size": 1, "proximal": 0.5},
        {**ADAMW, "steps": 3, "batch_size": 4},
        {**ADAMW, "epochs": 1, "batch_size": 2, "micro_batch": 1, "max_grad_norm": 0.1},
    ],
    ids=str,
)
def test_a_cohort_equals_its_clients_one_by_one(settings):
    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, **settings)
    members = [(Request(silo.name, 3, "train", shaken(model, place)), silo) for place, silo in enumerate(silos(model))]
    alone, together = both_ways(work, members)
    assert furthest(alone, together) < 1e-5


PROMPTS = {
    "prompt": prompt(3),
    "prefix": prefix(3),
    "p_tuning": p_tuning(3, 8, encoder="shared"),
    "p_tuning LSTM": p_tuning(3, 8, encoder="shared", kind="LSTM"),
    "personal": prompt(3, personal=2),
}


@pytest.mark.filterwarnings("ignore:.*dropout", "ignore:For MLP")
@pytest.mark.parametrize("name", PROMPTS)
@pytest.mark.parametrize("settings", [{**SGD, "steps": 2, "batch_size": 4, "max_grad_norm": 0.5}, {**SGD, "epochs": 1}])
def test_a_cohort_of_prompts_equals_its_clients_one_by_one(name, settings):
    model = PROMPTS[name].attach(tiny_model(len(TOKENIZER)), 0)
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, **settings)
    members = [(Request(silo.name, 3, "train", shaken(model, place)), silo) for place, silo in enumerate(silos(model))]
    before = dict(model.named_parameters())
    alone, together = both_ways(work, members)
    assert furthest(alone, together) < 1e-5
    assert all(value is before[name] for name, value in model.named_parameters())


def test_personal_prompts_of_a_cohort_are_those_of_its_clients_one_by_one():
    model = prompt(3, personal=2).attach(tiny_model(len(TOKENIZER)), 0)
    first = {name: value.detach().clone() for name, value in trained(model).items()}
    work = keeping(local_training(causal_loss(), TOKENIZER.pad_token_id, steps=2, batch_size=2, **SGD), first)
    sent = {name: value for name, value in first.items() if name.endswith("shared")}
    members = [(Request(silo.name, 0, "train", sent), silo) for silo in silos(model)]
    for (one, kept), (other, known) in zip([work.client(*each) for each in members], work.cohort(members), strict=True):
        assert one.tensors.keys() == other.tensors.keys() == sent.keys() and kept.keys() == known.keys()
        for left, right in ((one.tensors, other.tensors), (kept, known)):
            assert all(torch.allclose(left[name], right[name], rtol=0, atol=1e-5) for name in left)


def test_clients_with_unequal_steps_answer_in_the_order_they_were_asked():
    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, epochs=1, batch_size=1)
    assert [work.steps(silo.data) for silo in silos(model)] == [5, 2, 3, 4]
    start = shaken(model, 0)
    members = [(Request(silo.name, 0, "train", start), silo) for silo in silos(model, sizes=(5, 2, 5, 2))]
    assert [reply.client for reply, _ in work.cohort(members)] == ["s0", "s1", "s2", "s3"]


def test_a_really_trained_model_gives_the_same_one_by_one_and_together():
    if not STORIES.is_dir():
        pytest.skip(f"the small trained model is not here: {STORIES}")
    from fedllm.silo.models import load_model, load_tokenizer

    tokenizer = load_tokenizer(str(STORIES))
    model = lora(8).attach(load_model(str(STORIES), torch.device("cpu"), torch.float32), 0)
    texts = [
        "Once upon a time there was a little girl named Lily.",
        "Tom and his dog ran to the big red tree.",
        "Rain!",
    ]
    rows = instruct(tokenizer).prepare([{"prompt": "Tell me.", "response": text} for text in texts], "rows").examples
    start = {name: value.detach().clone() for name, value in trained(model).items()}
    # Adam divides what is nearly nothing by itself: a tenth of one of its steps, for a few values of A.
    for settings, allowed in ((SGD, 1e-5), (ADAMW, 1e-4)):
        work = local_training(causal_loss(), 0, steps=3, batch_size=2, **settings)
        members = [
            (Request(f"s{place}", 0, "train", start), Silo(f"s{place}", model, {"train": rows[place:]}, {}, place))
            for place in range(3)
        ]
        alone = [work.client(*member)[0] for member in members]
        together = [reply for reply, _ in work.cohort(members)]
        assert alone[0].tensors.keys() == start.keys()
        for one, other in zip(alone, together, strict=True):
            for name in start:
                torch.testing.assert_close(one.tensors[name], other.tensors[name], rtol=0, atol=allowed)


def test_a_cohort_of_one_is_the_client():
    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, steps=2, batch_size=2, **SGD)
    members = [(Request("s0", 0, "train", shaken(model, 0)), silos(model)[0])]
    assert furthest(*both_ways(work, members)) < 1e-6


def test_a_client_does_not_feel_who_else_is_in_its_cohort():
    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, steps=2, batch_size=2, max_grad_norm=0.5, **SGD)
    start = shaken(model, 0)
    members = [(Request(silo.name, 0, "train", start), silo) for silo in silos(model)]
    wild = [(members[1][0]._replace(tensors={name: 20 * value for name, value in start.items()}), members[1][1])]
    calm = work.cohort([members[0], *members[2:]])[0][0]
    beside = work.cohort([members[0], *wild])[0][0]
    assert furthest([calm], [beside]) < 1e-5


def test_the_model_is_as_before_after_a_cohort():
    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    before = {name: (value, value.detach().clone(), value.requires_grad) for name, value in model.named_parameters()}
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, steps=2, batch_size=2)
    work.cohort([(Request(silo.name, 0, "train", shaken(model, 1)), silo) for silo in silos(model)])
    after = dict(model.named_parameters())
    assert after.keys() == before.keys() and not model.training
    for name, (parameter, values, learned) in before.items():
        assert after[name] is parameter and torch.equal(parameter, values) and parameter.requires_grad == learned
        assert parameter.grad is None


def test_the_model_is_as_before_after_an_exception():
    def stop(tokens):
        raise KeyboardInterrupt

    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    before = dict(model.named_parameters())
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, steps=2, batch_size=2)
    members = [(Request(s.name, 0, "train", shaken(model, 1)), s._replace(tick=stop)) for s in silos(model)]
    with pytest.raises(KeyboardInterrupt):
        work.cohort(members)
    assert dict(model.named_parameters()).keys() == before.keys()
    assert all(value is before[name] for name, value in model.named_parameters())
    assert stackable(model)


def test_every_silo_hears_of_its_own_tokens_at_every_step():
    model = lora(4).attach(tiny_model(len(TOKENIZER)), 0)
    heard = {f"s{place}": [] for place in range(4)}
    opened = [silo._replace(tick=heard[silo.name].append) for silo in silos(model)]
    work = local_training(causal_loss(), TOKENIZER.pad_token_id, steps=3, batch_size=2)
    replies = work.cohort([(Request(silo.name, 0, "train", shaken(model, 1)), silo) for silo in opened])
    for reply, _ in replies:
        assert len(heard[reply.client]) == 3 and sum(heard[reply.client]) == reply.scalars["tokens"]


def test_stacked_adapters_are_the_parameters_that_are_trained_each_for_its_own_rows():
    model = lora(4).attach(tiny_model(), 0)
    each = [shaken(model, seed) for seed in range(3)]
    row = torch.tensor([[5, 6, 7, 8]])
    alone = []
    for values in each:
        write(trained(model), values)
        alone.append(model(input_ids=row).logits)
    with stacked(model, {name: torch.stack([values[name] for values in each]) for name in each[0]}) as params:
        assert params.keys() == each[0].keys()
        assert all(value.shape[0] == 3 and value.requires_grad for value in params.values())
        together = model(input_ids=row.repeat(3, 1)).logits
    torch.testing.assert_close(together, torch.cat(alone), rtol=0, atol=1e-5)
    assert not torch.allclose(alone[0], alone[1], atol=1e-2)
    assert trained(model).keys() == each[0].keys()


@pytest.mark.parametrize(
    "trainable",
    [lora(2), ffa_lora(2), lora(4, rslora=True), lora(2, target_modules=["down_proj", "q_proj"]), *PROMPTS.values()],
    ids=lambda t: t.name,
)
@pytest.mark.filterwarnings("ignore:.*dropout", "ignore:For MLP")
def test_plain_lora_and_prompts_can_be_stacked(trainable):
    assert stackable(trainable.attach(tiny_model(), 0))


@pytest.mark.filterwarnings("ignore:Model has `tie_word", "ignore:`lora_bias=True`")
@pytest.mark.parametrize(
    "trainable",
    [
        dora(2),
        lora(2, dropout=0.1),
        full(),
        ia3(),
        peft_method("CPT", cpt_token_ids=[5, 6, 7]),
        peft_method(
            "P_TUNING",
            num_virtual_tokens=3,
            encoder_hidden_size=8,
            encoder_reparameterization_type="LSTM",
            encoder_dropout=0.1,
            encoder_num_layers=2,
        ),
        peft_method("LORA", r=2, target_modules=["q_proj", "embed_tokens"]),
        peft_method("LORA", r=2, target_modules=["q_proj"], modules_to_save=["norm"]),
        peft_method("LORA", r=2, target_modules=["q_proj"], lora_bias=True),
        peft_method("LORA", r=2, bias="lora_only", target_modules=["q_proj"], trainable_token_indices=[5]),
    ],
    ids=lambda trainable: trainable.name,
)
def test_what_is_neither_plain_lora_on_linear_layers_nor_a_prompt_is_not_stacked(trainable):
    assert not stackable(trainable.attach(tiny_model(), 0))


def test_a_cohort_is_as_wide_as_makes_its_batch_cheap():
    model, cpu = torch.nn.Linear(1, 1), torch.device("cpu")
    assert cohort_width(model, 2, 64, cpu) > 1
    assert cohort_width(model, 64, 4096, cpu) == 1
    assert cohort_width(model, 1, 16, cpu) > cohort_width(model, 2, 64, cpu)


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"steps": 3, "epochs": 1.0}, "client.steps and client.epochs are both set"),
        ({"steps": 0}, "client.steps is 0"),
        ({"epochs": -1.0}, "client.epochs is -1.0"),
        ({"batch_size": 0}, "client.batch_size is 0"),
        ({"micro_batch": -2}, "client.micro_batch is -2"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, reason):
    with pytest.raises(FedllmError, match=reason):
        local_training(causal_loss(), 0, **settings)


def test_a_slow_silo_in_a_cohort_equals_it_alone():
    model = lora(4).attach(tiny_model(vocab=len(TOKENIZER)), 0)
    work = local_training(causal_loss(), 0, steps=4, batch_size=2, **ADAMW)
    members = [
        (Request(silo.name, 1, "train", shaken(model, 0), {"slow": 3.0} if place in (0, 2) else {}), silo)
        for place, silo in enumerate(silos(model))
    ]
    alone, together = both_ways(work, members)
    assert furthest(alone, together) < 1e-5
    assert alone[0].scalars["tokens"] < alone[1].scalars["tokens"] / 2
