"""Searches by scores alone: what a silo sends, what it is scored on, what becomes of it, and what is refused."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.algorithms.black_box import black_box
from fedllm.algorithms.evolution import begin, new_search
from fedllm.algorithms.fedbpt import fedbpt, merged, perturbed, server_sigma, triangle, untriangle
from fedllm.algorithms.method import Ground
from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.plan import plan
from fedllm.core.types import Request, Silo
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.select import everyone
from fedllm.runtime.local import local
from fedllm.runtime.wire import message_bytes, reply_head
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import prompt
from fedllm.silo.scoring import log_likelihoods
from fedllm.silo.tasks import classify, word_tokens
from fedllm.silo.trainables import lora, trained
from tests.tiny import tiny_model, tiny_tokenizer

pytest.importorskip("cma")

TOKENIZER = tiny_tokenizer()
WORDS = {"good": "positive", "bad": "negative"}
ROWS = [{"text": f"the cat sat {i}", "label": ("good", "bad")[i % 2]} for i in range(6)]


def ground(trainable=None, transforms=()):
    trainable = trainable or prompt(4)
    task = classify(TOKENIZER, words=WORDS)
    model = trainable.attach(tiny_model(len(TOKENIZER)), 0).eval()
    return Ground(
        ["a", "b", "c"], 2, 0, model, TOKENIZER, task, trainable, causal_loss(), mean(), transforms, batch_size=5
    )


def silo(ground, name="a"):
    data = {"train": ground.task.prepare(ROWS, name).examples, "test": ground.task.prepare(ROWS, name).examples}
    return Silo(name, ground.model, data, {}, 7)


def test_a_silo_sends_its_scores_and_nothing_else_and_they_are_those_of_peft_one_at_a_time():
    here = ground()
    method = black_box(here, dim=6, population=8, examples=0)
    request = Request("a", 0, "train", method.start)
    reply, memory = method.algorithm(everyone(["a"])).client(request, silo(here))
    assert {name: value.shape for name, value in reply.tensors.items()} == {"scores": (8,)}
    assert set(reply.scalars) == {"train_loss", "tokens", "calls"} and reply.weight == 6 and memory == {}
    assert message_bytes(reply.tensors, reply_head(reply)) < 500
    assert plan(method.algorithm(everyone(["a"])), method.start).bytes_up == 4 * 8

    words = word_tokens(TOKENIZER, here.task)
    examples = silo(here).data["train"]
    for place in (0, 5):
        shown = {"z": method.start["candidates"][place].float()}
        evaluated, _ = method.evaluator(Request("a", 0, "evaluate", shown), silo(here))
        costs = []
        for example in examples:
            own = tuple(label for label in example.labels if label != IGNORED)
            text = example.input_ids[: -len(own)]
            rows = [Example([*text, *word], [IGNORED] * len(text) + list(word)) for word in words]
            totals = torch.tensor(log_likelihoods(here.model, rows, causal_loss(), pad_id=0, batch_size=1))
            costs.append(-float(totals.log_softmax(0)[words.index(own)]))
        assert float(reply.tensors["scores"][place]) == pytest.approx(sum(costs) / 6, abs=1e-3)
        assert math.isfinite(evaluated.scalars["accuracy"])


@pytest.mark.parametrize("transforms", [(), (clip(0.5), cast("bfloat16"))], ids=["plain", "clipped"])
def test_rounds_search_and_the_server_is_told_the_mean_over_silos(transforms):
    here = ground(transforms=transforms)
    method = black_box(here, dim=6, population=8, examples=2)
    algorithm = method.algorithm(everyone(here.names))
    state = algorithm.init(method.start)
    for number in range(2):
        state, report = algorithm.server(state, local(algorithm.client, lambda name: silo(here, name), {}))
        assert report["clients"] == 3 and report["best_score"] <= report["score"]
        assert int(state.optimiser["counts"][0]) == number + 1
    assert float(method.shown(state)["z"].abs().max()) > 0


def test_the_export_is_a_prompt_that_peft_opens(tmp_path):
    from peft import PeftModel

    here = ground()
    method = black_box(here, dim=6, population=8, text="the cat")
    z = torch.arange(6.0) / 10
    here.model.base_model.config.name_or_path = ""
    method.export(here.model, {"z": z}, tmp_path)
    opened = PeftModel.from_pretrained(tiny_model(len(TOKENIZER)), str(tmp_path))
    (learned,) = trained(here.model).values()
    got = next(value for name, value in opened.named_parameters() if "prompt" in name)
    assert torch.equal(got, learned)
    ids = TOKENIZER("the cat")["input_ids"]
    start = here.model.get_input_embeddings().weight[[ids[i % len(ids)] for i in range(4)]]
    method.export(here.model, {"z": torch.zeros(6)}, tmp_path)
    assert torch.equal(learned, start)


def test_what_cannot_be_searched_is_refused():
    with pytest.raises(FedllmError, match="set trainable"):
        black_box(ground(lora(2)))
    with pytest.raises(FedllmError, match="candidates"):
        black_box(ground(), population=2)
    with pytest.raises(FedllmError, match="'clip' could change"):
        fedbpt(ground(transforms=(clip(1.0),)))
    unnamed = ground()._replace(task=classify(TOKENIZER))
    with pytest.raises(FedllmError, match="at least two labels"):
        black_box(unnamed)


def test_fedbpt_sends_its_distribution_in_under_4_kb_and_merges():
    here = ground()
    method = fedbpt(here, dim=6, population=4, generations=2, examples=2)
    algorithm = method.algorithm(everyone(here.names))
    state = algorithm.init(method.start)
    for _ in range(2):
        state, report = algorithm.server(state, local(algorithm.client, lambda name: silo(here, name), {}))
        assert report["clients"] == 3
    assert not torch.equal(state.params["mean"], method.start["mean"])
    sizes = plan(fedbpt(here).algorithm(everyone(["a"])), fedbpt(here).start)
    assert sizes.bytes_up + sizes.bytes_down < 4096


def test_the_merge_by_hand():
    assert server_sigma([torch.tensor([1.0, 2.0]), torch.tensor([2.0, 4.0])], 2) == 2.5
    search = new_search(2, 4, 1.0, 0)
    state = {**begin(search), "local": torch.tensor([0.5]).double()}
    two = [
        {"mean": torch.tensor([1.0, 0.0]), "fitness": torch.tensor([1.0]), "sigmas": torch.tensor([1.0, 3.0])},
        {"mean": torch.tensor([3.0, 2.0]), "fitness": torch.tensor([2.0]), "sigmas": torch.tensor([1.0, 4.0])},
    ]
    kept, sigma = merged(search, state, two)
    assert kept["mean"].tolist() == [2.0, 1.0] and sigma == pytest.approx(math.sqrt(12.5))
    three = [*two, {**two[0], "fitness": torch.tensor([5.0])}]
    kept, sigma = merged(search, state, three)
    # sqrt(3 * 1 / 3 / 2) before the update, and the silos' own step size by the same factor as the server's.
    assert sigma == pytest.approx(0.5 * float(kept["sigma"]) / math.sqrt(0.5))
    assert 1.0 < float(kept["mean"][0]) < 3.0


def test_a_triangle_is_its_matrix_and_perturbing_leaves_the_answer():
    whole = torch.tensor([[1.0, 2, 3], [2, 4, 5], [3, 5, 6]])
    assert torch.equal(untriangle(triangle(whole), 3), whole)
    example = Example(list(range(50, 90)), [IGNORED] * 38 + [88, 89])
    other = perturbed(example, 0.5, 307, 0, 0)
    assert other.labels == example.labels and other.input_ids[38:] == [88, 89]
    assert 8 < sum(a != b for a, b in zip(other.input_ids, example.input_ids, strict=True)) < 30
    assert perturbed(example, 0.0, 307, 0, 0) == example
