"""Rows that are there twice go, at one silo or at several, and the hashes that travel say nothing without the salt."""

from __future__ import annotations

import hashlib
import hmac

import pytest
import torch
from torch import nn

from fedllm.algorithms.duplicates import read_fingerprints, shared_duplicates, to_drop
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Reply, Silo
from fedllm.runtime.local import local
from fedllm.silo.cleaning import clean
from fedllm.silo.dedupe import exact_duplicates, fingerprints, near_duplicates, salt_from, shingles, without

SALT = b"0123456789abcdef"


def rows(*texts: str) -> list[dict[str, str]]:
    return [{"text": text} for text in texts]


def test_of_equal_texts_the_first_stays():
    done = clean(rows("The cat.", "the  CAT.\n", "\u2126", "Ω", "the cat"), [exact_duplicates()])
    assert [row["text"] for row in done.rows] == ["The cat.", "\u2126", "the cat"]
    assert done.counts["0.exact_duplicates.dropped"] == 2


def test_shingles_are_runs_of_words_and_short_texts_are_one():
    assert shingles("One, two; three!", 2) == [b"one two", b"two three"]
    assert shingles("one", 5) == [b"one"]
    assert shingles("", 5) == [b""]


def numbered(words: range, changed: int = 0) -> str:
    """A text of different words, some at the end replaced."""
    kept = [f"w{word}" for word in words]
    return " ".join([*kept[: len(kept) - changed], *(f"x{word}" for word in range(changed))])


def test_near_duplicates_go_and_others_stay():
    pytest.importorskip("datasketch", reason="the extra 'pretrain' is not installed")
    base = numbered(range(200))
    given_rows = rows(base, numbered(range(200), 4), numbered(range(200), 80), numbered(range(1000, 1200)), base)
    done = clean(given_rows, [near_duplicates(threshold=0.8)])
    # Of 196 runs 4 replaced ones leave 192: 192 / 200 = 0.96. Of 80 they leave 116 of 276: 0.42.
    assert done.rows == [given_rows[0], given_rows[2], given_rows[3]]
    assert done.counts["0.near_duplicates.dropped"] == 2
    assert clean(given_rows, [near_duplicates(threshold=0.8)]) == done


def test_a_threshold_has_to_be_a_share():
    with pytest.raises(FedllmError, match="threshold is 0"):
        near_duplicates(threshold=0)


def test_fingerprints_are_hmacs_of_the_normalised_text():
    expected = hmac.new(SALT, b"the cat", hashlib.sha256).digest()[:16]
    assert fingerprints(["The  cat"], SALT).numpy().tobytes() == expected
    assert fingerprints([], SALT).shape == (0, 2)
    assert not torch.equal(fingerprints(["the cat"], SALT), fingerprints(["the cat"], SALT[::-1]))


def run(silos: dict[str, list[str]]):
    """Each silo's rows after the round, and the report."""
    algorithm = shared_duplicates(lambda round_number: list(silos), salt=lambda: SALT)
    memory: dict = {}
    exchange = local(
        algorithm.client,
        lambda name: Silo(name, nn.Identity(), {"train": silos[name][:1], "test": silos[name][1:]}, {}, 0),
        memory,
    )
    messages = []

    def watched(requests):
        messages.extend(requests)
        for reply in exchange(requests):
            messages.append(reply)
            yield reply

    _, report = algorithm.server(algorithm.init({}), watched)
    left = {
        name: [row["text"] for row in without(rows(*texts), "text", SALT, memory[name]["drop"])]
        for name, texts in silos.items()
    }
    return left, report, messages


def test_a_text_of_several_silos_stays_at_one_whatever_their_order():
    silos = {"a": ["one", "two", "only a"], "b": ["One ", "three", "two"], "c": ["two", "only c"]}
    left, report, _ = run(silos)
    everything = sorted(text.strip().lower() for texts in left.values() for text in texts)
    assert everything == ["one", "only a", "only c", "three", "two"]
    assert report == {f"shared.{name}": len(silos[name]) - len(left[name]) for name in silos}
    assert run(dict(reversed(silos.items())))[0] == left


def test_keeping_is_shared_out_among_the_silos():
    prints = torch.unique(fingerprints([f"text {number}" for number in range(400)], SALT), dim=0)
    drop = to_drop({"a": prints, "b": prints})
    assert len(drop["a"]) + len(drop["b"]) == 400
    assert 150 < len(drop["a"]) < 250


def test_order_and_repeats_of_a_silos_texts_do_not_travel():
    replies = [
        next(each for each in run({"a": texts})[2] if isinstance(each, Reply) and each.tensors).tensors["fingerprints"]
        for texts in (["x", "y", "x"], ["y", "x"])
    ]
    assert torch.equal(*replies)


def test_without_a_salt_nothing_is_hashed(monkeypatch):
    monkeypatch.setenv("SALT_OF_TEST", "short")
    with pytest.raises(FedllmError, match="SALT_OF_TEST has no salt"):
        salt_from("SALT_OF_TEST")


@pytest.mark.parametrize(
    "reply",
    [
        Reply("z", 0, {"fingerprints": torch.zeros(1, 2).long()}, 1.0),
        Reply("a", 1, {"fingerprints": torch.zeros(1, 2).long()}, 1.0),
        Reply("a", 0, {}, 1.0),
        Reply("a", 0, {"fingerprints": torch.zeros(1, 2)}, 1.0),
        Reply("a", 0, {"fingerprints": torch.zeros(2).long()}, 1.0),
        Reply("a", 0, {"fingerprints": torch.zeros(2, 2).long()}, 1.0),
    ],
)
def test_what_is_not_fingerprints_is_refused(reply):
    with pytest.raises(Refused):
        read_fingerprints(reply, 0, {"a"})
