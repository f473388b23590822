from __future__ import annotations

import gzip
import json
from itertools import islice
from pathlib import Path

import pytest
import torch

from fedllm.core.errors import FedllmError
from fedllm.core.types import Request, Silo
from fedllm.evaluation.choice import multiple_choice
from fedllm.evaluation.exact import exact_match
from fedllm.evaluation.generate import chat_once, complete
from fedllm.silo.answers import last_number, matches
from fedllm.silo.evaluate import held_out
from fedllm.silo.examples import collate
from fedllm.silo.models import load_model, load_tokenizer
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import p_tuning, prefix, prompt
from fedllm.silo.scoring import continuation, score_continuations
from fedllm.silo.tasks import causal, instruct
from fedllm.silo.templates import Turn, opening
from fedllm.silo.trainables import full, lora, trained
from tests.tiny import tiny_model, tiny_tokenizer

SHARED = Path(__file__).resolve().parents[3] / "shared"
STORIES = SHARED / "data" / "models" / "stories260k"
real = pytest.mark.skipif(not STORIES.is_dir(), reason="the folder of real data and models is not here")

TOKENIZER = tiny_tokenizer(chat=True)
ASKED = [
    [Turn("user", "where is the cat?")],
    [Turn("system", "be brief"), Turn("user", "is it so that 42 cats sat on the very same mat?")],
    [Turn("user", "why?"), Turn("assistant", "the cat"), Turn("user", "hm")],
]
TRAINABLES = [full(), lora(4), prefix(3), prompt(3), p_tuning(3, 8)]
QUESTIONS = [{"prompt": "how many cats?", "answer": "3 cats"}, {"prompt": "and dogs?", "answer": "4 dogs"}]


def read(name, count):
    with gzip.open(SHARED / "data" / name, "rt", encoding="utf-8") as file:
        return [json.loads(line) for line in islice(file, count)]


def with_trainable(trainable):
    model = trainable.attach(tiny_model(len(TOKENIZER)), 0).eval()
    draw = torch.Generator().manual_seed(0)
    if trainable.adapter:
        with torch.no_grad():
            for value in trained(model).values():
                value.add_(torch.randn(value.shape, generator=draw), alpha=0.3)
    return model


def greedy(model, turns, count):
    """Take the likeliest token again and again, without cache, padding or `generate`."""
    ids = TOKENIZER(opening(TOKENIZER, turns, chat=True), add_special_tokens=False)["input_ids"]
    new = []
    while len(new) < count:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([ids + new]), use_cache=False).logits[0, -1].argmax())
        if token == TOKENIZER.eos_token_id:
            break
        new.append(token)
    return TOKENIZER.decode(new, skip_special_tokens=True).strip()


def taught(rows, steps=60):
    """Train the tiny model until it knows the answers by heart, as a chat."""
    model = full().attach(tiny_model(len(TOKENIZER)), 0)
    batch = collate(instruct(TOKENIZER).prepare(rows, "rows").examples, 0, torch.device("cpu"))
    optimiser = torch.optim.Adam(model.parameters(), 1e-2)
    for _ in range(steps):
        optimiser.zero_grad()
        causal_loss()(model, batch).sum().backward()
        optimiser.step()
    return model


@pytest.mark.parametrize("trainable", TRAINABLES, ids=lambda trainable: trainable.name)
def test_what_is_written_in_batches_is_what_one_at_a_time_gives(trainable):
    model = with_trainable(trainable)
    wanted = [greedy(model, turns, 8) for turns in ASKED]
    assert complete(model, TOKENIZER, ASKED, max_new_tokens=8) == wanted
    assert complete(model, TOKENIZER, ASKED, max_new_tokens=8, batch_size=2) == wanted
    assert ["".join(chat_once(model, TOKENIZER, turns, max_new_tokens=8)).strip() for turns in ASKED] == wanted


def test_sampling_repeats_with_its_seed_and_leaves_the_global_generator_alone():
    model = tiny_model(len(TOKENIZER))
    before = torch.random.get_rng_state()
    first, again, other = (
        complete(model, TOKENIZER, ASKED, max_new_tokens=8, temperature=2.0, seed=seed) for seed in (1, 1, 2)
    )
    assert first == again != other
    assert torch.equal(before, torch.random.get_rng_state())


def test_writing_stops_at_the_end_token():
    rows = [
        {"prompt": "where?", "response": "the cat sat"},
        {"prompt": "who is it?", "response": "on the mat"},
    ]
    model, heard = taught(rows), []
    asked = [[Turn("user", row["prompt"])] for row in rows]
    written = complete(model, TOKENIZER, asked, max_new_tokens=60, tick=heard.append)
    assert written == ["the cat sat", "on the mat"]
    assert sum(heard) < 60
    pieces = list(chat_once(model, TOKENIZER, asked[0], max_new_tokens=60))
    assert "".join(pieces).strip() == "the cat sat" and len(pieces) > 1


def test_a_chat_that_is_closed_early_stops_the_model():
    steps = []
    model = tiny_model(len(TOKENIZER))
    model.generation_config.eos_token_id = None
    handle = model.register_forward_hook(lambda *_: steps.append(1))
    pieces = chat_once(model, TOKENIZER, ASKED[0], max_new_tokens=400, temperature=3.0)
    next(pieces)
    pieces.close()
    handle.remove()
    assert len(steps) < 400


def test_what_goes_wrong_while_chatting_reaches_the_reader():
    model = tiny_model(20)
    with pytest.raises(IndexError):
        list(chat_once(model, TOKENIZER, ASKED[0], max_new_tokens=4))


def test_a_conversation_without_a_question_is_refused():
    for turns in ([], [Turn("user", "a"), Turn("assistant", "b")]):
        with pytest.raises(FedllmError, match="nothing to answer"):
            complete(tiny_model(len(TOKENIZER)), TOKENIZER, [turns])


def test_exact_match_of_a_model_that_knows_half():
    rows = [
        {"prompt": QUESTIONS[0]["prompt"], "response": "it is 3 cats"},
        {"prompt": QUESTIONS[1]["prompt"], "response": "it is 5 dogs"},
    ]
    numbers = [{**row, "answer": row["answer"].split()[0]} for row in QUESTIONS]
    model = taught(rows)
    assert exact_match(model, TOKENIZER, numbers, max_new_tokens=24) == (0.5, 2, 0.5)
    assert exact_match(model, TOKENIZER, numbers, max_new_tokens=24, limit=1).accuracy == 1.0


@pytest.mark.parametrize(
    ("written", "answer", "right"),
    [
        ("The total is $1,234.00.", "1234", True),
        ("12 - 5 = 7", "7", True),
        ("12-5", "5", True),
        ("so it is -5", "-5", True),
        ("it falls by −5", "-5", True),  # noqa: RUF001
        ("a loss of -$5", "-5", True),
        ("7 of 8\n#### 7\nQuestion 9", "7", True),
        ("#### none, but 3", "3", True),
        ("the sets 1,2,3", "3", True),
        ("0.5", ".5", True),
        ("I do not know", "3", False),
        ("30", "3", False),
        ("work #### 12", "work: 3 * 4 = 12 #### 12", True),
        ("An Eiffel   Tower.", "the eiffel tower", True),
        ("yes", "no", False),
    ],
)
def test_answers(written, answer, right):
    assert matches(written, answer) is right


def test_the_last_number_keeps_its_decimals():
    assert float(last_number("about 2,500.25 or so")) == 2500.25


def test_multiple_choice_counts_by_log_likelihood_a_character():
    model = tiny_model(len(TOKENIZER))
    choices = ["the cat", "on the mat and so on", "é", "negative"]
    asked = [continuation(TOKENIZER, "Question: what?\nAnswer:", f" {choice}") for choice in choices]
    scored = score_continuations(model, asked, causal_loss(), pad_id=0)
    rates = [each.total / len(choice) for each, choice in zip(scored, choices, strict=True)]
    best = rates.index(max(rates))
    rows = [{"question": "what?", "choices": choices, "answer": place} for place in range(len(choices))]
    found = multiple_choice(model, TOKENIZER, rows, causal_loss(), batch_size=3)
    assert found == (0.25, 4, 0.25)
    assert multiple_choice(model, TOKENIZER, [rows[best], *rows], causal_loss(), limit=1) == (1.0, 1, 0.0)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"answer": 2}, "row 2: 'answer' is 2; give a place from 0 to 1"),
        ({"answer": "a"}, "row 2: 'answer' is 'a'"),
        ({"choices": ["a"]}, "row 2: 'choices' is"),
        ({"choices": "ab"}, "row 2: 'choices' is"),
        ({"choices": ["a", " "]}, "row 2: 'choices' is"),
        ({"question": None}, "row 2: no column 'question' among answer, choices"),
    ],
)
def test_a_row_that_is_no_question_is_refused(change, told):
    row = {"question": "q", "choices": ["a", "b"], "answer": 0}
    bad = {key: value for key, value in {**row, **change}.items() if value is not None}
    with pytest.raises(FedllmError, match=told):
        multiple_choice(tiny_model(len(TOKENIZER)), TOKENIZER, [row, bad], causal_loss(), where="q.jsonl")


def test_no_questions_are_refused():
    model = tiny_model(len(TOKENIZER))
    with pytest.raises(FedllmError, match="no questions"):
        multiple_choice(model, TOKENIZER, [], causal_loss())
    with pytest.raises(FedllmError, match="no questions"):
        exact_match(model, TOKENIZER, QUESTIONS, limit=0)
    with pytest.raises(FedllmError, match="row 1: no column 'answer'"):
        exact_match(model, TOKENIZER, [{"prompt": "a"}])


@real
def test_a_real_model_prefers_its_own_kind_of_text():
    tokenizer = load_tokenizer(str(STORIES))
    model = load_model(str(STORIES), torch.device("cpu"), torch.float32)
    stories = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park."
    task = causal(tokenizer, block=64)

    def loss(text):
        silo = Silo("a", model, {"test": task.prepare([{"text": text}], "rows").examples}, {}, 0)
        reply, _ = held_out(causal_loss(), task, tokenizer, full())(Request("a", 0, "evaluate", {}), silo)
        return reply.scalars["loss"]

    assert loss(stories) < 2.0 < loss("Whereas the undersigned lessee indemnifies, pursuant to clause 7(b), SQL.")
    (told,) = complete(model, tokenizer, [[Turn("user", "Once upon a time")]], max_new_tokens=24)
    assert told


@real
def test_real_questions_are_answered_about_as_often_as_by_chance_by_so_small_a_model():
    tokenizer = load_tokenizer(str(STORIES))
    model = load_model(str(STORIES), torch.device("cpu"), torch.float32)
    found = multiple_choice(model, tokenizer, read("evaluate/piqa.choice.jsonl.gz", 100), causal_loss())
    assert found.n == 100 and 0.35 < found.accuracy < 0.75 and found.error == pytest.approx(0.05, abs=0.003)
    maths = exact_match(model, tokenizer, read("evaluate/svamp.exact.jsonl.gz", 4), max_new_tokens=8)
    assert maths.n == 4 and 0 <= maths.accuracy <= 1
