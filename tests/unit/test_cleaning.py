"""The steps of a list run in order, row by row, and count what they drop; Gopher's rules say what they say."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.silo.cleaning import clean, cleaned, utf8
from fedllm.silo.dedupe import exact_duplicates
from fedllm.silo.quality import quality, repeated, repeated_runs, repetition, top_run

WORDS = " ".join(f"the word{number} and" for number in range(40))  # 120 words


def rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def test_steps_run_in_order_and_everything_is_counted():
    given_rows = rows("a b", "A  B", "c", "bad \ud800", "read \ufffd wrongly")
    done = clean(given_rows, [utf8(), exact_duplicates()])
    assert done.rows == rows("a b", "c")
    assert done.counts == {
        "read": 5, "kept": 2, "0.utf8.not UTF-8": 1, "0.utf8.read wrongly": 1, "1.exact_duplicates.dropped": 1,
    }  # fmt: skip
    assert clean(given_rows, []).rows == given_rows
    assert clean([], [utf8()]).counts == {"read": 0, "kept": 0}


def test_a_row_passes_before_the_next_is_read():
    counts: Counter[str] = Counter()
    read = []
    stream = cleaned((read.append(row) or row for row in rows("a", "b")), [utf8(), exact_duplicates()], counts)
    assert next(stream) == {"text": "a"}
    assert len(read) == 1


def test_a_list_of_steps_can_be_run_again():
    steps = [exact_duplicates()]
    assert clean(rows("a", "a"), steps) == clean(rows("a", "a"), steps)


def test_what_is_not_utf8_can_be_refused():
    with pytest.raises(FedllmError, match="not UTF-8"):
        clean(rows("\ud800"), [utf8(bad="refuse")])


def test_a_missing_column_is_named():
    with pytest.raises(FedllmError, match="no column 'body'"):
        clean(rows("a"), [exact_duplicates("body")])


def test_a_text_may_be_several_columns():
    pairs = [{"prompt": "a", "response": "b"}, {"prompt": "a", "response": "c"}, {"prompt": "A", "response": "b"}]
    assert clean(pairs, [exact_duplicates(["prompt", "response"])]).rows == pairs[:2]


def reason(text: str, step=None) -> str | None:
    counts = clean(rows(text), [step or quality()]).counts
    found = [key.split(".", 2)[2] for key in counts if "." in key]
    assert counts["kept"] == (not found)
    return found[0] if found else None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (WORDS, None),
        ("", "too short"),
        (" ".join(WORDS.split()[:49]), "too short"),
        (" ".join(WORDS.split()[:50]), None),
        ("the of " * 50_001, "too long"),
        ("a b the of " * 20, "word length"),
        ("the of " + "extraordinarily " * 60, "word length"),
        (WORDS + " #" * 14, "symbols"),
        (WORDS + " #" * 13, None),
        ("\n".join(f"- {line}" for line in [WORDS] * 10), "bullets"),
        ("\n".join(f"{line}…" for line in [WORDS] * 10), "ellipses"),
        (WORDS + " 1234" * 31, "few letters"),
        (WORDS + " 1234" * 30, None),
        (" ".join(f"word{number} the" for number in range(40)), "no stop words"),
    ],
)
def test_gophers_rules_of_quality(text, why):
    assert reason(text) == why


def test_other_languages_have_other_stop_words():
    text = " ".join(f"mot{number} la" for number in range(40))
    assert reason(text) == "no stop words"
    assert reason(text, quality(stop_words=0)) is None


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (" ".join(f"the word{number}" for number in range(40)), None),
        ("", None),
        ("\n".join(["one two", "three", "one two", "four", "one two"]), "repeated lines"),
        ("\n\n".join(["one two\nx", "y\none three", "one two\nx", "z"]), "repeated lines"),
        ("very well " * 30, "one run of words"),
        (" ".join(f"a{n} b{n} c{n} d{n} e{n} f{n}" for n in [*range(20), *range(20)]), "repeated words"),
    ],
)
def test_gophers_rules_of_repetition(text, why):
    assert reason(text, repetition()) == why


def test_shares_of_repetition_by_hand():
    assert repeated(["aa", "b", "aa", "aa"]) == (0.5, 4 / 7)
    assert top_run(["x", "yy", "x", "yy", "x"], 2) == 6  # "x yy" twice, three characters each
    assert top_run(["a", "b", "c"], 2) == 0
    assert repeated_runs(["a", "b", "c", "x", "a", "b", "c"], 2) == 3
    assert repeated_runs(["a", "a", "a", "a"], 2) == 3  # all but the first


@given(st.lists(st.sampled_from("ab"), max_size=30), st.integers(2, 5))
def test_repeated_runs_never_count_a_word_twice(words, size):
    assert 0 <= repeated_runs(words, size) <= max(0, len(words) - 1)
