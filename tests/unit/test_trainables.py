"""Whatever is learned can be sent, averaged, written back, exported, loaded by peft alone, and taken away."""

from __future__ import annotations

import importlib.util

import pytest
import torch
from peft import PEFT_TYPE_TO_CONFIG_MAPPING, PeftModel, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.types import Request, Silo
from fedllm.silo.examples import Example
from fedllm.silo.ffa import ffa_lora
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import p_tuning, prefix, prompt
from fedllm.silo.trainables import (
    NOT_AVERAGED,
    Trainable,
    dora,
    export,
    full,
    ia3,
    lora,
    peft_method,
    trained,
    write,
)
from fedllm.silo.training import local_training
from tests.tiny import tiny_model

KINDS = {str(kind.value): config for kind, config in PEFT_TYPE_TO_CONFIG_MAPPING.items()}

# Settings that a model of width 32 needs; all other methods take their defaults.
SETTINGS = {
    "ADAPTION_PROMPT": {"adapter_len": 3, "adapter_layers": 2},
    "C3A": {"block_size": 16},
    "CARTRIDGE": {"num_virtual_tokens": 3},
    "CPT": {"cpt_token_ids": [5, 6, 7]},
    "FOURIERFT": {"n_frequency": 20},
    "MISS": {"r": 4},
    "P_TUNING": {"num_virtual_tokens": 3, "encoder_hidden_size": 8},
    "PREFIX_TUNING": {"num_virtual_tokens": 3},
    "PROMPT_TUNING": {"num_virtual_tokens": 3},
    "PSOFT": {"r": 4},
    "ROAD": {"group_size": 8},
    "SHIRA": {"r": 4},
    "TRAINABLE_TOKENS": {"token_indices": [5, 6]},
    "VBLORA": {"vector_length": 4, "num_vectors": 8},
    "WAVEFT": {"n_frequency": 20},
}

NO_PLACE = {
    "ADAPTION_PROMPT", "BEFT", "CARTRIDGE", "CPT", "LILY", "P_TUNING", "PREFIX_TUNING", "PROMPT_TUNING", "SHADOW",
}  # fmt: skip
"""Methods whose adapter is no change of weights that the model has."""

AVERAGED = sorted(KINDS.keys() - NOT_AVERAGED.keys())

EVERY: dict[str, Trainable] = {
    "lora": lora(4),
    "rslora": lora(4, rslora=True),
    "ffa_lora": ffa_lora(4),
    "dora": dora(4),
    "ia3": ia3(),
    "prefix": prefix(3),
    "prompt": prompt(3),
    "p_tuning": p_tuning(3, 8),
    "full": full(),
    **{f"peft {name}": peft_method(name, **SETTINGS.get(name, {})) for name in AVERAGED},
}

draw = torch.Generator().manual_seed(0)
IDS = torch.randint(3, 307, (2, 7), generator=draw)
DATA = [
    {"train": [Example(ids, ids) for ids in torch.randint(3, 307, (size, 9), generator=draw).tolist()], "test": []}
    for size in (4, 8)
]


@torch.no_grad()
def answers(model):
    return model.eval()(input_ids=IDS).logits[:, -IDS.shape[1] :]


def attach(trainable, seed=0):
    return trainable.attach(tiny_model(), seed)


def needs(name):
    if "ADAMSS" in name and importlib.util.find_spec("sklearn") is None:
        pytest.skip("peft's AdaMSS needs scikit-learn, which is not here")


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_what_is_learned_is_trained_averaged_exported_and_loaded_by_peft_alone(name, tmp_path):
    needs(name)
    trainable = EVERY[name]
    before = answers(tiny_model())
    model = attach(trainable)
    start = {key: value.detach().clone() for key, value in trained(model).items()}
    frozen = {key: value.detach().clone() for key, value in model.named_parameters() if key not in start}
    assert start

    # One round of two silos, by hand: train, average, write back.
    work = local_training(causal_loss(), 0, steps=2, batch_size=2, learning_rate=1e-2)
    fold = mean()
    total, largest = fold.zero(start), 0.0
    for place, data in enumerate(DATA):
        silo = Silo(f"s{place}", model, data, {}, place)
        reply, _ = work.client(Request(silo.name, 0, "train", start), silo)
        again, _ = work.client(Request(silo.name, 0, "train", start), silo)
        assert all(torch.equal(reply.tensors[key], again.tensors[key]) for key in start), "training repeats"
        largest = max(largest, *(float(value.abs().max()) for value in reply.tensors.values()))
        total = fold.add(total, reply.tensors, reply.weight)
    assert largest > 1e-3
    change = fold.done(total)
    assert all(bool(torch.isfinite(value).all()) for value in change.values())
    write(trained(model), {key: start[key] - change[key] for key in start})
    assert all(torch.equal(value, frozen[key]) for key, value in model.named_parameters() if key in frozen)
    learned = answers(model)
    assert float((learned - before).abs().max()) > 1e-4

    if trainable.adapter:
        with trainable.base(model):
            torch.testing.assert_close(answers(model), before, rtol=0, atol=1e-5)
        torch.testing.assert_close(answers(model), learned, rtol=0, atol=1e-4)
        assert trained(model).keys() == start.keys()

    export(model, tmp_path)
    assert not list(tmp_path.glob("*.bin")) and all(load_file(file) for file in tmp_path.glob("*.safetensors"))
    if trainable.adapter:
        loaded = PeftModel.from_pretrained(tiny_model(), tmp_path)
    else:
        loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    torch.testing.assert_close(answers(loaded), learned, rtol=0, atol=1e-4)

    if name.removeprefix("peft ").upper() in NO_PLACE | {"PREFIX", "PROMPT"}:
        with pytest.raises(FedllmError, match="use the run's adapter folder instead"):
            trainable.merge(model)
        return
    merged = trainable.merge(model)
    torch.testing.assert_close(answers(merged), learned, rtol=0, atol=1e-3)
    merged.save_pretrained(tmp_path / "merged")
    plain = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(answers(plain), learned, rtol=0, atol=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", EVERY)
def test_attaching_depends_on_the_seed_only(name):
    needs(name)
    state = torch.random.get_rng_state()
    one, other = (trained(attach(EVERY[name], 5)) for _ in range(2))
    assert one.keys() == other.keys() and all(torch.equal(one[key], other[key]) for key in one)
    assert torch.equal(state, torch.random.get_rng_state())


def test_every_method_of_peft_is_averaged_or_refused_with_its_reason():
    assert NOT_AVERAGED.keys() <= KINDS.keys()
    for name, reason in NOT_AVERAGED.items():
        with pytest.raises(FedllmError, match=f"'{name}' cannot be averaged: {reason}; use 'lora'"):
            peft_method(name)


def test_adalora_prunes_other_ranks_at_every_silo():
    kept = []
    for data in DATA:
        torch.manual_seed(0)
        config = KINDS["ADALORA"](
            task_type="CAUSAL_LM", total_step=6, tinit=1, tfinal=2, deltaT=1, init_r=6, target_r=2,
            target_modules=["q_proj", "v_proj"],
        )  # fmt: skip
        model = get_peft_model(tiny_model(), config)
        adam = torch.optim.Adam(trained(model).values(), 1e-2)
        for step in range(6):
            ids = torch.tensor([row.input_ids for row in data["train"]])
            model(input_ids=ids, labels=ids).loss.backward()
            adam.step()
            model.base_model.update_and_allocate(step)
            adam.zero_grad()
        kept.append({key: value.ne(0).flatten().tolist() for key, value in trained(model).items() if "lora_E" in key})
    assert kept[0].keys() == kept[1].keys() and kept[0] != kept[1]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("name", "config"), [("POLY", {}), ("MULTITASK_PROMPT_TUNING", {"num_virtual_tokens": 3})])
def test_methods_steered_by_task_ids_answer_nothing_without_them(name, config):
    model = get_peft_model(tiny_model(), KINDS[name](task_type="CAUSAL_LM", **config))
    with pytest.raises(ValueError, match="task_ids"):
        answers(model)


@pytest.mark.filterwarnings("ignore")
def test_xlora_without_adapters_that_exist_learns_nothing():
    base = tiny_model()
    base.config.use_cache = False
    model = get_peft_model(base, KINDS["XLORA"](task_type="CAUSAL_LM", hidden_size=32, adapters={}))
    with torch.no_grad():
        for value in trained(model).values():
            value.add_(1.0)
    assert torch.equal(answers(model), answers(tiny_model()))


def test_lora_starts_as_the_model_and_takes_the_attention_projections():
    model = attach(lora(4))
    torch.testing.assert_close(answers(model), answers(tiny_model()), rtol=0, atol=0)
    targets = {key.split(".lora_")[0].rpartition(".")[2] for key in trained(model)}
    assert targets == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert {value.dtype for value in trained(model).values()} == {torch.float32}


@pytest.mark.filterwarnings("ignore")
def test_methods_that_train_something_else_than_projections_keep_their_own_targets():
    assert all("norm" in key for key in trained(attach(peft_method("LN_TUNING"))))
    assert {key.split(".ia3_")[0].rpartition(".")[2] for key in trained(attach(peft_method("IA3")))} == {
        "k_proj", "v_proj", "down_proj",
    }  # fmt: skip
    assert all("embed_tokens" in key for key in trained(attach(peft_method("TRAINABLE_TOKENS", token_indices=[5]))))


@pytest.mark.parametrize("make", [lora, dora])
def test_target_modules_that_the_model_does_not_have_are_answered_with_those_it_has(make):
    with pytest.raises(FedllmError) as caught:
        attach(make(4, target_modules=["c_attn"]))
    text = str(caught.value)
    assert "does not fit LlamaForCausalLM" in text and "c_attn" in text and "\n" not in text
    for layer in ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"):
        assert layer in text
    assert "base_layer" not in text


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("name", "config"),
    [
        ("FOURIERFT", {}),
        ("VBLORA", {}),
        ("C3A", {}),
        ("SHIRA", {}),
        ("ROAD", {}),
        ("LORA", {"r": 0}),
        ("LORA", {"lora_dropout": 3.0}),
    ],
)
def test_settings_that_do_not_fit_the_model_give_one_sentence(name, config):
    with pytest.raises(FedllmError, match=f"peft's {name} does not fit LlamaForCausalLM") as caught:
        attach(peft_method(name, **config))
    # What is wrong need not be where the method aims.
    assert "change that setting under [trainable], or aim" in str(caught.value)
    assert "\n" not in str(caught.value) and "base_layer" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "config"),
    [("ADAPTION_PROMPT", {}), ("LORA", {"r": "many"}), ("LORA", {"layers_to_transform": [0], "target_modules": "q.*"})],
    ids=["missing", "of the wrong type", "not together"],
)
def test_settings_that_are_no_settings_give_one_sentence(name, config):
    with pytest.raises(FedllmError, match=f"peft's {name} cannot take the settings of trainable") as caught:
        attach(peft_method(name, **config))
    assert "\n" not in str(caught.value)


def test_what_goes_wrong_without_the_adapter_leaves_what_is_trained_as_it_was():
    model = attach(ffa_lora(4))
    learned = trained(model).keys()
    with pytest.raises(KeyboardInterrupt), ffa_lora(4).base(model):
        raise KeyboardInterrupt
    assert trained(model).keys() == learned and not any(".lora_A." in name for name in learned)


def test_a_method_that_needs_another_package_says_which(monkeypatch):
    if importlib.util.find_spec("sklearn") is not None:
        pytest.skip("scikit-learn is here")
    with pytest.raises(FedllmError, match=r"needs a package that is not installed \(scikit-learn"):
        attach(peft_method("ADAMSS"))


def test_a_rank_that_peft_divides_by_is_a_setting_that_it_cannot_take():
    with pytest.raises(FedllmError, match=r"VERA cannot take the settings of trainable \(.*zero\); one is missing, 0,"):
        attach(peft_method("VERA", r=0))


def test_unknown_methods_and_settings_are_answered_with_the_nearest():
    with pytest.raises(FedllmError, match="did you mean 'LORA'"):
        peft_method("LORAA")
    with pytest.raises(
        FedllmError, match=r"trainable.lora_alfa is not a setting of peft's LORA; did you mean 'lora_alpha'"
    ):
        peft_method("LORA", lora_alfa=3)
    with pytest.raises(FedllmError, match="num_virtual_tokens is missing"):
        peft_method("PROMPT_TUNING")
    for count in (0, "many"):
        with pytest.raises(FedllmError, match=rf"num_virtual_tokens is {count!r}; it must be a whole number, 1 or"):
            peft_method("PREFIX_TUNING", num_virtual_tokens=count)


def test_writing_other_names_than_the_models_is_refused():
    params = trained(attach(lora(2)))
    values = {name: value.detach() for name, value in params.items()}
    name = next(iter(values))
    for wrong in ({**values, "x": torch.ones(1)}, {key: value for key, value in values.items() if key != name}):
        with pytest.raises(FedllmError, match="first odd name"):
            write(params, wrong)


def test_all_weights_are_trained_in_float32():
    model = full().attach(tiny_model().bfloat16(), 0)
    assert {value.dtype for value in trained(model).values()} == {torch.float32}
    assert trained(model).keys() == dict(model.named_parameters()).keys()
