"""Text prompts: where candidates come from, what is spent on them, and which stay."""

from __future__ import annotations

import json

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.algorithms.budget import Budget
from fedllm.algorithms.edits import edits, paraphrases
from fedllm.algorithms.method import Ground
from fedllm.algorithms.text_prompt import Pool, charged, text_prompt
from fedllm.algorithms.trying import affordable
from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.texts import texts_in
from fedllm.core.types import Reply, Request, Silo
from fedllm.exchange.select import everyone, fixed_size
from fedllm.runtime.local import local
from fedllm.silo.objective import causal_loss
from fedllm.silo.tasks import classify
from fedllm.silo.trainables import none
from tests.tiny import tiny_model, tiny_tokenizer

TOKENIZER = tiny_tokenizer()
START = "Say it. Be kind, be brief."
BANK = ("Think first.", "Answer now.")
ROWS = [{"text": f"the cat sat {i}", "label": ("good", "bad")[i % 2]} for i in range(8)]
TASK = classify(TOKENIZER, words={"good": "positive", "bad": "negative"})
GROUND = Ground(
    ["a", "b", "c"], 4, 0, tiny_model(len(TOKENIZER)), TOKENIZER, TASK, none(), causal_loss(), mean(), batch_size=8
)


def searching(**keys):
    return text_prompt(GROUND, **{"prompt": START, "calls": 10_000, "candidates": 5, "keep": 2, "examples": 2, **keys})


def silo(name):
    examples = TASK.prepare(ROWS, name).examples
    return Silo(name, GROUND.model, {"train": examples, "test": examples}, {}, 3)


@settings(max_examples=40, deadline=None)
@given(st.integers(0, 2**60), st.integers(1, 12))
def test_edits_are_new_and_made_of_the_prompts_and_the_bank_alone(seed, wanted):
    made = edits(BANK)([START, "Be kind."], wanted, seed)
    known = set(" ".join([START, "Be kind.", *BANK]).split())
    assert made == edits(BANK)([START, "Be kind."], wanted, seed) and made.calls == 0
    assert len(made.texts) == len(set(made.texts)) <= wanted
    for text in made.texts:
        assert text not in (START, "Be kind.") and set(text.split()) <= known


def test_paraphrases_are_counted_as_calls_of_the_model():
    asked = []

    def write(question, seed):
        asked.append(question)
        return f' "Other {seed}\nwords" ', 10

    made = paraphrases(write)([START], 3, 100)
    assert made.texts == ["Other 100 words", "Other 101 words", "Other 102 words"]
    assert (made.calls, made.tokens) == (3, 30) and all(START in question for question in asked)


@settings(max_examples=25, deadline=None)
@given(st.data())
def test_whatever_the_silos_do_no_more_is_allowed_than_the_budget(data):
    calls = data.draw(st.integers(15, 120))
    tokens = data.draw(st.one_of(st.none(), st.integers(1, 20_000)))
    algorithm = searching(calls=calls, tokens=tokens).algorithm(everyone(GROUND.names))
    state, allowed = algorithm.init(searching().start), 0
    token_limit = tokens if tokens is not None else 1 << 62
    spent_tokens = 0
    draws = torch.Generator().manual_seed(data.draw(st.integers(0, 1 << 30)))
    for _ in range(12):

        def exchange(requests):
            nonlocal allowed, spent_tokens
            for request in requests:
                share = request.scalars
                count = len(texts_in("candidates", request.tensors))
                used = min(2, int(share["calls"]) // count) * count
                if data.draw(st.booleans()):
                    # Silent, but it may have worked: its whole share is gone.
                    allowed += int(share["calls"])
                    spent_tokens += int(share["tokens"]) if tokens is not None else 0
                    continue
                said = data.draw(st.sampled_from([used, -1, 10**9]))
                lies = said != used
                allowed += int(share["calls"]) if lies else used
                spent_tokens += int(share["tokens"]) if tokens is not None else 0
                scalars = {"calls": float(said), "tokens": float(share["tokens"])}
                yield Reply(request.client, request.round, {"scores": torch.rand(count, generator=draws)}, 2.0, scalars)

        before = state.params
        state, report = algorithm.server(state, exchange)
        assert allowed <= calls and spent_tokens <= token_limit
        assert report["calls_spent"] == allowed and report["calls_left"] == calls - allowed
        if report["asked"] == 0:
            assert texts_in("prompt", state.params) == texts_in("prompt", before)


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 200), st.integers(0, 5000))
def test_a_silo_scores_what_its_share_pays_for(calls, tokens):
    examples = silo("a").data["train"]
    chosen, spent = affordable(examples, [START, "Be kind."], TOKENIZER, Budget(calls, tokens))
    assert spent.calls == 2 * len(chosen) <= calls and spent.tokens <= tokens
    more, dear = affordable(examples, [START, "Be kind."], TOKENIZER, Budget(10**6, 10**6))
    assert len(more) == len(examples) and (len(chosen) == len(more) or dear.tokens > tokens or dear.calls > calls)


def test_what_a_silo_says_it_spent_is_believed_within_its_share():
    share = Budget(10, 100)
    reply = Reply("a", 0, {}, 1.0, {"calls": 4.0, "tokens": 1e9})
    assert charged(reply, share) == (4, 100) and charged(None, share) == (10, 100)


def test_rounds_keep_the_best_and_the_result_is_what_was_seen_enough_of(tmp_path):
    method = searching(bonus=0.5)
    algorithm = method.algorithm(everyone(GROUND.names))
    state = algorithm.init(method.start)
    for _ in range(3):
        state, report = algorithm.server(state, local(algorithm.client, silo, {}))
        assert report["calls_spent"] <= 10_000 and report["clients"] == 3
    assert len(texts_in("pool", state.params)) == 2
    shown = method.shown(state)
    assert texts_in("prompt", shown) == [report["prompt"]]
    replies = [
        method.evaluator(Request("a", 0, "evaluate", shown, {"base": base}), silo("a"))[0] for base in (0.0, 1.0)
    ]
    assert replies[0].scalars["loss"] != replies[1].scalars["loss"]
    method.export(GROUND.model, shown, tmp_path)
    told = json.loads((tmp_path / "prompt.json").read_text())
    assert told["prompt"] == report["prompt"] and "{text}" in told["template"]


def test_the_bandit_by_hand():
    pool = Pool(["often", "once", "never"], torch.tensor([0.5, 0.6, 0.0]), torch.tensor([100.0, 4.0, 0.0]))
    # 0.5 - 0.1 against 0.6 - 0.5; and 0.5 + 0.1 against 0.6 + 0.5.
    assert pool.bound(-1.0) == [1, 0, 2] and pool.bound(1.0) == [0, 1, 2]


def test_one_silo_a_round_costs_one_silos_calls():
    algorithm = searching().algorithm(fixed_size(GROUND.names, 1))
    _, report = algorithm.server(algorithm.init(searching().start), local(algorithm.client, silo, {}))
    assert report["calls_spent"] == 5 * 2 and report["asked"] == 1


@pytest.mark.parametrize(
    ("keys", "word"),
    [
        ({"calls": 0}, "budget of zero"),
        ({"tokens": 0}, "budget of zero"),
        ({"calls": 14}, "pays for no round"),
        ({"prompt": "much too long " * 20}, "algorithm.longest"),
        ({"prompt": ""}, "algorithm.prompt"),
        ({"longest": 600}, "sees 512 tokens"),
        ({"keep": 5}, "algorithm.keep"),
    ],
)
def test_what_cannot_be_searched_is_refused(keys, word):
    with pytest.raises(FedllmError, match=word):
        searching(**keys).algorithm(everyone(GROUND.names))
