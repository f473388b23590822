"""Splitting keeps every row, is repeatable, and skews what it says it skews."""

from __future__ import annotations

import re
from collections import Counter
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.silo.groups import labels_of, who_holds_what
from fedllm.silo.partition import by_column, by_label, dirichlet, iid, quantity
from fedllm.silo.sources import read_rows

SHARED = Path(__file__).resolve().parents[3] / "shared"

TOPICS = {
    "cooking": "simmer the onion and garlic in butter then season the soup with pepper",
    "sailing": "hoist the mainsail and steer the boat into the harbour against the wind",
    "maths": "prove that the matrix has an inverse when its determinant differs from zero",
}


def make(labels: list[str]) -> list[dict]:
    return [{"id": number, "label": label, "text": f"{label} text"} for number, label in enumerate(labels)]


def topics(each: int = 20) -> list[dict]:
    return [
        {"id": f"{topic}{number}", "topic": topic, "text": " ".join(words.split()[number % 4 :])}
        for topic, words in TOPICS.items()
        for number in range(each)
    ]


def ids(silos: dict) -> list:
    return sorted(row["id"] for rows in silos.values() for row in rows)


LABELS = st.lists(st.sampled_from("abcde"), min_size=5, max_size=80)


@settings(deadline=None)
@given(LABELS, st.integers(1, 5), st.sampled_from([1e-3, 0.1, 1.0, 1e3]), st.integers(0, 3))
def test_every_row_is_in_exactly_one_silo_and_seeds_repeat(labels, silos, alpha, seed):
    rows = make(labels)
    splits = [
        lambda: by_column(rows, "label"),
        lambda: iid(rows, silos, seed),
        lambda: dirichlet(rows, silos, alpha, "label", seed=seed),
        lambda: dirichlet(rows, silos, alpha, clusters=3, seed=seed),
        lambda: quantity(rows, silos, max(alpha, 1.0), seed, at_least=1),
    ]
    for split in splits:
        parts = split()
        assert ids(parts) == list(range(len(rows)))
        assert parts == split()
        assert list(parts) == sorted(parts)
        assert all(parts.values())


@settings(deadline=None)
@given(LABELS, st.integers(1, 5))
def test_iid_and_dirichlet_have_equal_sizes(labels, silos):
    for parts in (iid(make(labels), silos), dirichlet(make(labels), silos, 0.1, "label")):
        sizes = [len(rows) for rows in parts.values()]
        assert max(sizes) - min(sizes) <= 1


@settings(deadline=None)
@given(st.sets(st.text(), min_size=1, max_size=12))
def test_silo_names_are_safe_and_never_collide(values):
    parts = by_column([{"source": value, "id": value} for value in values], "source")
    assert len(parts) == len(values)
    assert all(re.fullmatch(r"[a-z0-9_]{1,60}", name) for name in parts)


def test_silo_names_are_readable():
    rows = [{"source": source} for source in ("St. Mary's", "Zürich", "NIH", "nih", 1861, None)]
    assert list(by_column(rows, "source")) == ["1861", "nih", "nih_2", "none", "st_mary_s", "zurich"]


def skew(silos: dict, column: str) -> float:
    """The silos' mean distance (total variation) from the label shares of all rows."""
    whole = Counter(row[column] for rows in silos.values() for row in rows)
    total = sum(whole.values())
    far = []
    for rows in silos.values():
        own = Counter(row[column] for row in rows)
        far.append(sum(abs(own[label] / len(rows) - whole[label] / total) for label in whole) / 2)
    return sum(far) / len(far)


def test_a_smaller_alpha_skews_labels_more_and_a_large_one_hardly():
    rows = make(["a", "b", "c", "d"] * 100)

    def mean(alpha: float) -> float:
        return sum(skew(dirichlet(rows, 4, alpha, "label", seed=seed), "label") for seed in range(5)) / 5

    even = sum(skew(iid(rows, 4, seed), "label") for seed in range(5)) / 5
    assert mean(0.05) > mean(2.0) > mean(20.0) > even / 2
    assert mean(0.05) > 5 * even
    assert mean(1e5) < 2 * even


def test_without_a_column_the_topics_of_the_text_are_found_and_skewed():
    rows = topics()
    by_text, evenly = [], []
    for seed in range(6):
        labels = labels_of(rows, None, 3, "text", seed)
        assert len(set(zip(labels, [row["topic"] for row in rows], strict=True))) == 3
        by_text.append(skew(dirichlet(rows, 3, 0.01, clusters=3, text="text", seed=seed), "topic"))
        evenly.append(skew(iid(rows, 3, seed), "topic"))
    assert sum(by_text) > 2 * sum(evenly)


def test_quantity_skews_sizes():
    sizes = [len(part) for part in quantity(make(["a"] * 1000), 5, 0.5, seed=2).values()]
    assert min(sizes) >= 8
    assert max(sizes) > 2 * min(sizes)
    with pytest.raises(FedllmError, match="raise alpha, lower at_least, or take fewer silos"):
        quantity(make(["a"] * 30), 4, 0.5)


def test_what_cannot_be_split_is_refused():
    rows = make(["a", "b"])
    for silos in (0, 3):
        with pytest.raises(FedllmError, match="give 1 to 2 silos"):
            iid(rows, silos)
    with pytest.raises(FedllmError, match="alpha is 0"):
        dirichlet(rows, 2, 0, "label")
    with pytest.raises(FedllmError, match="did you mean 'label'"):
        dirichlet(rows, 2, 1.0, "labels")
    with pytest.raises(FedllmError, match="no column 'body'"):
        dirichlet(rows, 2, 1.0, text=["body"])


def test_who_holds_what_by_column():
    silos = {"one": make(["a", "a", "b"]), "two": make(["b"]), "none": []}
    assert who_holds_what(silos, "label") == {
        "groups": ["a", "b"],
        "counts": {"one": [2, 1], "two": [0, 1], "none": [0, 0]},
        "rows": {"one": 3, "two": 1, "none": 0},
        "words": {"one": 9, "two": 3, "none": 0},
    }


def test_who_holds_what_puts_small_groups_together():
    held = who_holds_what({"one": make([f"label{n % 30}" for n in range(100)] + ["other"])}, "label")
    assert len(held["groups"]) == 12 and held["groups"][-1] == "other"
    assert sum(held["counts"]["one"]) == 101


def test_who_holds_what_names_clusters_by_their_words():
    rows = topics()
    held = who_holds_what({topic: [row for row in rows if row["topic"] == topic] for topic in TOPICS}, None)
    for topic, words in TOPICS.items():
        named = [group for group, n in zip(held["groups"], held["counts"][topic], strict=True) if n]
        assert sum(held["counts"][topic]) == 20
        assert all(set(name.split(", ")) & {topic, *words.split()} for name in named)
    assert all(sum(1 for n in column if n) == 1 for column in zip(*held["counts"].values(), strict=True))
    assert who_holds_what({}, None)["groups"] == []
    assert who_holds_what({"one": [{"n": 1}]}, None)["groups"] == ["no words"]


def test_real_labels():
    path = SHARED / "data" / "banking77" / "train.jsonl.gz"
    if not path.is_file():
        pytest.skip("the shared data folder is not on this machine")
    rows = read_rows(path)
    parts = dirichlet(rows, 10, 0.1, "label")
    assert sum(map(len, parts.values())) == len(rows)
    assert min(len({row["label"] for row in part}) for part in parts.values()) < 30


def test_by_label_deals_labels_out_and_every_row_once():
    rows = [{"text": str(i), "label": f"k{i % 7}"} for i in range(50)]
    parts = by_label(rows, 3, "label", seed=1)
    held = [{row["label"] for row in part} for part in parts.values()]
    assert sorted(map(len, held)) == [2, 2, 3] and len(set.union(*held)) == 7
    assert sorted(int(row["text"]) for part in parts.values() for row in part) == list(range(50))
    assert parts == by_label(rows, 3, "label", seed=1) != by_label(rows, 3, "label", seed=2)
    with pytest.raises(FedllmError, match="has 7 values, which cannot be dealt out to 8 silos"):
        by_label(rows, 8, "label")
