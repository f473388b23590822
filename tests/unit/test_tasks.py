"""From rows to examples: what is scored, what is skipped, and what is wrong with a row."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.silo.examples import IGNORED
from fedllm.silo.tasks import causal, classify, instruct, word_tokens
from tests.tiny import CHATML, tiny_tokenizer

CHAT, PLAIN = tiny_tokenizer(chat=True), tiny_tokenizer()


def only(task, row):
    prepared = task.prepare([row], "a.jsonl")
    assert prepared.skipped == 0
    return prepared.examples[0]


def whole(tokenizer, example):
    return tokenizer.decode(example.input_ids)


def scored(tokenizer, example):
    """The text that is scored, pieces of it apart."""
    pieces, open_piece = [], False
    for token, label in zip(example.input_ids, example.labels, strict=True):
        assert label in (token, IGNORED)
        if label != IGNORED:
            pieces = [*pieces[:-1], [*pieces[-1], token]] if open_piece else [*pieces, [token]]
        open_piece = label != IGNORED
    return [tokenizer.decode(piece) for piece in pieces]


def test_with_chatml_only_the_response_and_its_end_are_scored():
    example = only(instruct(CHAT), {"prompt": "where?", "response": "the cat"})
    assert whole(CHAT, example) == ("<|im_start|>user\nwhere?<|im_end|>\n<|im_start|>assistant\nthe cat<|im_end|>\n")
    assert scored(CHAT, example) == ["the cat<|im_end|>\n"]


def test_without_a_template_question_and_answer_are_marked_in_words():
    for task in (instruct(PLAIN), instruct(CHAT, template="plain")):
        example = only(task, {"prompt": "where?", "response": "the cat"})
        assert whole(PLAIN, example) == "Question: where?\nAnswer: the cat<|im_end|>"
        assert scored(PLAIN, example) == [" the cat<|im_end|>"]


TURNS = [
    {"role": "system", "content": "Be kind."},
    {"role": "user", "content": "one"},
    {"role": "assistant", "content": "two"},
    {"role": "user", "content": "three"},
    {"role": "assistant", "content": "four"},
]


def test_every_response_of_a_conversation_is_scored():
    example = only(instruct(CHAT), {"messages": TURNS})
    assert whole(CHAT, example) == CHAT.apply_chat_template(TURNS, tokenize=False)
    assert scored(CHAT, example) == ["two<|im_end|>\n", "four<|im_end|>\n"]
    example = only(instruct(PLAIN), {"messages": TURNS})
    assert whole(PLAIN, example) == (
        "Be kind.\nQuestion: one\nAnswer: two<|im_end|>Question: three\nAnswer: four<|im_end|>"
    )
    assert scored(PLAIN, example) == [" two<|im_end|>", " four<|im_end|>"]


def test_messages_may_come_as_an_array_and_what_follows_the_last_response_is_left_out():
    row = {"messages": np.array([*TURNS, {"role": "user", "content": "five"}], dtype=object)}
    assert only(instruct(CHAT), row) == only(instruct(CHAT), {"messages": TURNS})


def test_alpacas_fields_are_a_prompt_with_its_input_below():
    with_input = only(instruct(CHAT), {"instruction": "Add.", "input": "1 2", "output": "3"})
    assert with_input == only(instruct(CHAT), {"prompt": "Add.\n\n1 2", "response": "3"})
    for empty in ({"input": ""}, {"input": None}, {}):
        without = only(instruct(CHAT), {"instruction": "Add.", "output": "3", **empty})
        assert without == only(instruct(CHAT), {"prompt": "Add.", "response": "3"})


def test_columns_of_other_names_are_named():
    task = instruct(CHAT, prompt="question", response="long_answer")
    row = {"question": "where?", "long_answer": "the cat", "prompt": "no", "response": "no"}
    assert only(task, row) == only(instruct(CHAT), {"prompt": "where?", "response": "the cat"})


def test_an_example_is_tokenised_as_the_model_will_see_it_at_once():
    # Cut apart at the seam, "Answer:" + " the" could be other tokens than "Answer: the".
    example = only(instruct(PLAIN), {"prompt": "x", "response": "the cat sat on the mat"})
    assert example.input_ids == PLAIN(whole(PLAIN, example), add_special_tokens=False)["input_ids"]


@settings(deadline=None, max_examples=60)
@given(st.text(max_size=12), st.text(max_size=12))
def test_whatever_the_text_all_of_the_response_is_scored_and_nothing_of_the_prompt(prompt, response):
    example = only(instruct(CHAT), {"prompt": prompt, "response": response})
    assert scored(CHAT, example) == [f"{response}<|im_end|>\n"]


FORGETFUL = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{% if message['role'] == 'assistant' and not loop.last %}..."
    "{% else %}{{ message['content'] }}{% endif %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
THINKING = CHATML.replace("<|im_start|>assistant\n", "<|im_start|>assistant\n<think>")
PICKY = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}" + CHATML


def with_template(template):
    tokenizer = tiny_tokenizer(chat=True)
    tokenizer.chat_template = template
    return tokenizer


def test_a_template_that_rewrites_earlier_text_is_refused_with_the_remedy():
    task = instruct(with_template(FORGETFUL))
    assert scored(CHAT, only(task, {"prompt": "one", "response": "two"})) == ["two<|im_end|>\n"]
    with pytest.raises(FedllmError, match=r"cannot be masked.*task.template = 'plain'"):
        task.prepare([{"messages": TURNS}], "a.jsonl")


def test_a_template_whose_prompt_is_not_the_start_of_the_whole_is_refused():
    with pytest.raises(FedllmError, match="cannot be masked"):
        instruct(with_template(THINKING)).prepare([{"prompt": "one", "response": "two"}], "a.jsonl")


def test_a_template_that_refuses_a_conversation_is_quoted():
    task = instruct(with_template(PICKY))
    assert only(task, {"prompt": "one", "response": "two"})
    with pytest.raises(
        FedllmError, match=r"refuses a conversation of system, user.*System role not supported.*'plain'"
    ):
        task.prepare([{"messages": TURNS}], "a.jsonl")


def test_a_chat_template_that_is_not_there_cannot_be_asked_for():
    with pytest.raises(FedllmError, match="this tokenizer has no chat template; use template = 'plain'"):
        instruct(PLAIN, template="chat")


def test_responses_are_cut_and_rows_whose_prompt_is_too_long_are_counted():
    rows = [
        {"prompt": "hi", "response": "x" * 100},
        {"prompt": "y" * 100, "response": "hi"},
        {"prompt": "hi", "response": "ok"},
    ]
    prepared = instruct(CHAT, max_tokens=40).prepare(rows, "a.jsonl")
    assert prepared.skipped == 1 and len(prepared.examples) == 2
    first, second = prepared.examples
    assert len(first.input_ids) == len(first.labels) == 40
    assert set(scored(CHAT, first)[0]) == {"x"} and scored(CHAT, second) == ["ok<|im_end|>\n"]


def test_a_row_is_kept_from_the_first_token_of_its_response_that_fits():
    row = {"prompt": "hi", "response": "xyz"}
    full = only(instruct(CHAT), row)
    before = next(place for place, label in enumerate(full.labels) if label != IGNORED)
    assert instruct(CHAT, max_tokens=before).prepare([row], "a").skipped == 1
    kept = instruct(CHAT, max_tokens=before + 1).prepare([row], "a").examples[0]
    assert kept.labels == [*[IGNORED] * before, full.input_ids[before]]


@pytest.mark.parametrize(
    ("task", "row", "reason"),
    [
        (instruct(CHAT), {"text": "x", "id": 1}, r"no columns 'prompt' and 'response' .* among id, text; name yours"),
        (instruct(CHAT), {"prompt": "x"}, "no columns 'prompt' and 'response'"),
        (instruct(CHAT), {}, "among none"),
        (instruct(CHAT), {"messages": [{"role": "user", "content": "x"}]}, "no message of role 'assistant'"),
        (causal(CHAT), {"body": "x"}, "no column 'text' among body; name yours with task.text"),
        (classify(CHAT), {"text": "x"}, "no column 'label' among text; name yours with task.text and task.label"),
        (classify(CHAT), {"label": "x"}, "no column 'text' among label"),
    ],
)
def test_a_missing_column_is_named_with_file_and_row(task, row, reason):
    good = {"prompt": "a", "response": "b", "text": "a", "label": "b"}
    with pytest.raises(FedllmError, match=rf"^silos.a, row 2: .*{reason}"):
        task.prepare([good, row], "silos.a")


@pytest.mark.parametrize(
    ("task", "row", "column"),
    [
        (instruct(CHAT), {"prompt": None, "response": "x"}, "prompt"),
        (instruct(CHAT), {"prompt": "x", "response": None}, "response"),
        (instruct(CHAT), {"instruction": "x", "output": None}, "output"),
        (instruct(CHAT), {"messages": [{"role": "assistant", "content": None}]}, "content"),
        (instruct(CHAT), {"messages": [{"from": "gpt", "value": "x"}]}, "role"),
        (causal(CHAT), {"text": None}, "text"),
        (classify(CHAT), {"text": "x", "label": None}, "label"),
    ],
)
def test_a_null_is_never_learned_as_the_word_none(task, row, column):
    with pytest.raises(FedllmError, match=rf"^silos.a, row 1: '{column}' has no value; remove the row"):
        task.prepare([row], "silos.a")


@settings(deadline=None, max_examples=60)
@given(st.lists(st.text(max_size=20), max_size=8), st.integers(2, 9))
def test_packed_blocks_are_the_stream_itself_with_an_end_after_every_text(texts, block):
    prepared = causal(PLAIN, block=block).prepare([{"text": text} for text in texts], "a")
    stream = []
    for text in texts:
        ids = PLAIN(text, add_special_tokens=False)["input_ids"]
        stream += [*ids, PLAIN.eos_token_id] if ids else []
    # A last block of one token has nothing to score and is left out.
    if len(stream) % block == 1:
        stream.pop()
    assert [token for example in prepared.examples for token in example.input_ids] == stream
    assert all(len(example.input_ids) == block for example in prepared.examples[:-1])
    assert all(example.labels == example.input_ids for example in prepared.examples)
    assert prepared.skipped == texts.count("")


def test_a_text_column_of_another_name():
    one = causal(PLAIN, text="body").prepare([{"body": "the cat"}], "a").examples
    assert list(one) == list(causal(PLAIN).prepare([{"text": "the cat"}], "a").examples)


WORDS = {"0": "negative", "1": "positive", "2": "on the mat"}


def test_a_label_is_said_by_its_word_of_any_number_of_tokens():
    task = classify(PLAIN, words=WORDS)
    for label, word in WORDS.items():
        example = only(task, {"text": "the cat", "label": label})
        assert whole(PLAIN, example) == f"the cat\nLabel: {word}"
        assert scored(PLAIN, example) == [f" {word}"]
    lengths = {len(tokens) for tokens in word_tokens(PLAIN, task)}
    assert len(lengths) > 1
    assert [PLAIN.decode(tokens) for tokens in word_tokens(PLAIN, task)] == [f" {word}" for word in WORDS.values()]


def test_labels_may_be_numbers_and_without_words_say_themselves():
    assert only(classify(PLAIN, words=WORDS), {"text": "x", "label": 1}) == only(
        classify(PLAIN, words=WORDS), {"text": "x", "label": "1"}
    )
    task = classify(PLAIN, text="body", label="kind")
    assert whole(PLAIN, only(task, {"body": "x", "kind": "mat"})) == "x\nLabel: mat"
    assert task.label == "kind" and task.words == ()


def test_a_template_says_where_the_text_goes():
    task = classify(PLAIN, words=WORDS, template="Review: {text}\nIt is {sic}")
    assert whole(PLAIN, only(task, {"text": "{label} {text}", "label": "1"})) == (
        "Review: {label} {text}\nIt is {sic} positive"
    )
    assert task.cue == "\nIt is {sic}"
    with pytest.raises(FedllmError, match=r"has no \{text\}"):
        classify(PLAIN, template="nothing")


def test_a_label_without_a_word_is_named():
    with pytest.raises(FedllmError, match="no word for the label '7'; it knows 0, 1, 2"):
        classify(PLAIN, words=WORDS).prepare([{"text": "x", "label": "7"}], "a")


def test_a_text_too_long_to_be_classified_is_counted_never_cut():
    rows = [{"text": "z" * 100, "label": "1"}, {"text": "z", "label": "1"}]
    prepared = classify(PLAIN, words=WORDS, max_tokens=40).prepare(rows, "a")
    assert prepared.skipped == 1 and scored(PLAIN, prepared.examples[0]) == [" positive"]


def test_a_tokenizer_that_cannot_say_where_its_tokens_stand_is_refused():
    class Slow:
        is_fast, chat_template, eos_token, bos_token_id = False, None, "", None

        def __call__(self, text):
            return {"input_ids": [5]}

    with pytest.raises(FedllmError, match="Slow cannot say where its tokens stand; use the model's fast tokenizer"):
        instruct(Slow()).prepare([{"prompt": "a", "response": "b"}], "a")
