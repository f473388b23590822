"""A tokenizer learned from counts is the one that pooled text would give, and rare words stay where they are."""

from __future__ import annotations

import gzip
import json
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import AutoTokenizer

from fedllm.algorithms.tokenizer import byte_pairs, learn, spellings
from fedllm.core.errors import FedllmError
from fedllm.core.types import Reply, Silo
from fedllm.runtime.local import local
from fedllm.silo.count_noise import noised
from fedllm.silo.token_counts import Pairs, count_pairs, count_words, merged
from fedllm.silo.token_files import make_tokenizer, pooled_tokenizer
from tests.messages import pack_reply, unpack_reply

SHARED = Path(__file__).resolve().parents[3] / "shared" / "data" / "pretrain"
WORDS = ["the cat sat on the mat and the other cat sat there", "a mat, a hat; the hats of the cats!", "That's  that.\n"]
LAX = {"min_count": 1, "min_documents": 1, "min_silos": 1, "pairs": 10**6}

texts = st.lists(st.text(alphabet="ab c'é\n1!", max_size=40), min_size=1, max_size=6)


def exchange_over(silos: dict[str, list[str]], algorithm, memory=None, turned: bool = False):
    def opened(name):
        return Silo(name, nn.Identity(), {"train": silos[name], "test": silos[name]}, {}, 0)

    inner = local(algorithm.client, opened, {} if memory is None else memory)
    return (lambda requests: iter(list(inner(requests))[::-1])) if turned else inner


def learned(silos: dict[str, list[str]], vocab: int = 300, turned: bool = False, memory=None, **limits):
    algorithm = byte_pairs(lambda round_number: list(silos), vocab=vocab, **limits)
    state, reports = learn(algorithm, exchange_over(silos, algorithm, memory, turned))
    return state.params["merges"].tolist(), reports


def words_of(texts: list[str]) -> Counter[tuple[int, ...]]:
    cut = pooled_tokenizer([], 259).backend_tokenizer.pre_tokenizer.pre_tokenize_str
    return Counter(tuple(text[start:end].encode()) for text in texts for _, (start, end) in cut(text))


def merge_word(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    out, place = list[int](), 0
    while place < len(word):
        here = word[place : place + 2] == pair
        out.append(new if here else word[place])
        place += 2 if here else 1
    return tuple(out)


def pairs_of(words: Counter[tuple[int, ...]]) -> Counter[tuple[int, int]]:
    counts: Counter[tuple[int, int]] = Counter()
    for word, count in words.items():
        for pair in pairwise(word):
            counts[pair] += count
    return counts


@given(texts)
@settings(deadline=None, max_examples=40)
def test_every_merge_is_of_the_most_frequent_pair_as_in_sennrichs_algorithm(texts):
    merges, _ = learned({"a": texts}, vocab=275, share=1.0, **LAX)
    words, known = words_of(texts), set(spellings([]))
    for place, (left, right) in enumerate(merges):
        spelled, counts = spellings(merges[:place]), pairs_of(words)
        new = {pair: count for pair, count in counts.items() if spelled[pair[0]] + spelled[pair[1]] not in known}
        assert counts[left, right] == max(new.values())
        known.add(spelled[left] + spelled[right])
        merged_words: Counter[tuple[int, ...]] = Counter()
        for word, count in words.items():
            merged_words[merge_word(word, (left, right), 256 + place)] += count
        words = merged_words


@given(texts, st.integers(0, 40), st.integers(0, 40))
@settings(deadline=None, max_examples=60)
def test_words_after_merges_are_as_the_library_cuts_them(texts, merges, before):
    found, _ = learned({"a": texts}, vocab=259 + merges, **LAX)
    tokenizer, all_merges = make_tokenizer(found), np.array(found, np.int64).reshape(-1, 2)
    words = merged(merged(count_words(texts), all_merges[:before]), all_merges, min(before, len(found)))
    place_S = np.cumsum(words.symbols_S < 0)
    total = sum(words.counts_W[place] for place, symbol in zip(place_S, words.symbols_S, strict=True) if symbol >= 0)
    assert total == sum(map(len, tokenizer(texts, add_special_tokens=False)["input_ids"]))
    assert words.symbols_S.max(initial=0) < 256 + len(found)
    assert tokenizer.batch_decode(tokenizer(texts)["input_ids"]) == texts


def test_the_first_counts_are_those_of_a_count_by_hand():
    pairs = count_pairs(count_words(["aab aab", "ab"]), 1, 1)
    counted = {(key >> 32, key & 0xFFFFFFFF): count for key, count in zip(*map(np.ndarray.tolist, pairs), strict=True)}
    assert counted == {(97, 97): 2, (97, 98): 3, (32, 97): 1}  # words: "aab", " aab", "ab"


def test_silos_find_what_one_silo_with_all_text_finds_in_any_order_of_arrival():
    whole, _ = learned({"a": WORDS}, **LAX)
    silos = {"a": WORDS[:1], "b": WORDS[1:2], "c": WORDS[2:]}
    assert learned(silos, **LAX)[0] == learned(silos, turned=True, **LAX)[0] == whole
    assert len(whole) == 28  # then every word is one token


def test_a_node_that_forgets_answers_the_same():
    class Forgetful(dict):
        def __setitem__(self, name, kept):
            pass

    silos = {"a": WORDS, "b": WORDS[:2]}
    assert learned(silos, memory=Forgetful(), **LAX) == learned(silos, **LAX)


def test_what_one_silo_or_one_document_has_alone_is_no_token():
    silos = {"a": [*WORDS * 5, *["Zebulon Quux"] * 50], "b": WORDS * 5}
    spelled = {name: spellings(learned(silos, vocab=400, **more)[0]) for name, more in CASES.items()}
    assert b" Quux" in spelled["lax"]
    assert b" Quux" not in spelled["two silos"]
    silos["a"] = [*WORDS * 5, "Zebulon Quux " * 50]
    assert b" Quux" in spellings(learned(silos, vocab=400, min_silos=1, min_documents=1)[0])
    assert b" Quux" not in spellings(learned(silos, vocab=400, min_silos=1)[0])
    assert b" cat" in spelled["two silos"]


CASES = {"lax": {"min_silos": 1}, "two silos": {}}


def test_no_pair_below_the_limits_leaves_a_silo():
    words = count_words(["xy xy xy", "xy ab", "ab ab cd"], remembered=2)
    told = {(key >> 32, key & 0xFFFFFFFF) for key in count_pairs(words, 3, 2).keys_P.tolist()}
    assert told == {tuple(b"xy"), tuple(b"ab")}  # " x" and " a" are there twice, in one document and in two


def test_a_round_sends_no_more_than_the_limit():
    algorithm = byte_pairs(lambda round_number: ["a"], vocab=300, pairs=5, min_silos=1, min_count=1, min_documents=1)
    exchange = exchange_over({"a": WORDS}, algorithm)
    sizes = []

    def watched(requests):
        for reply in exchange(requests):
            assert pack_reply(unpack_reply(pack_reply(reply))) == pack_reply(reply)
            assert reply.tensors.keys() == {"pairs", "counts"}
            assert not reply.scalars
            sizes.append(len(reply.tensors["counts"]))
            yield reply

    learn(algorithm, watched)
    assert max(sizes) == 5
    assert {name: value.shape for name, value in algorithm.wire({}).items()} == {"pairs": (5, 2), "counts": (5,)}


GOOD = {"pairs": torch.tensor([[97, 98], [97, 99]], dtype=torch.int16), "counts": torch.tensor([9.0, 7.0])}
BAD = {
    "another round": Reply("b", 1, GOOD, 1.0),
    "not asked": Reply("z", 0, GOOD, 1.0),
    "names": Reply("b", 0, {"pairs": GOOD["pairs"]}, 1.0),
    "dtype": Reply("b", 0, {**GOOD, "counts": GOOD["counts"].double()}, 1.0),
    "shape": Reply("b", 0, {**GOOD, "counts": GOOD["counts"][:1]}, 1.0),
    "symbol": Reply("b", 0, {**GOOD, "pairs": torch.tensor([[97, 98], [97, 256]], dtype=torch.int16)}, 1.0),
    "negative": Reply("b", 0, {**GOOD, "pairs": torch.tensor([[-1, 98], [97, 98]], dtype=torch.int16)}, 1.0),
    "twice": Reply("b", 0, {**GOOD, "pairs": GOOD["pairs"][[0, 0]]}, 1.0),
    "too rare": Reply("b", 0, {**GOOD, "counts": torch.tensor([9.0, 1.0])}, 1.0),
    "not finite": Reply("b", 0, {**GOOD, "counts": torch.tensor([9.0, float("nan")])}, 1.0),
    "huge": Reply("b", 0, {**GOOD, "counts": torch.tensor([9.0, 1e30])}, 1.0),
}


@pytest.mark.parametrize("reply", BAD.values(), ids=BAD)
def test_a_reply_that_is_not_counts_is_dropped_and_named(reply):
    algorithm = byte_pairs(lambda round_number: ["a", "b"], min_silos=1)
    state, report = algorithm.server(algorithm.init({}), lambda requests: iter([Reply("a", 0, GOOD, 1.0), reply]))
    assert report[f"dropped.{reply.client}"]
    assert report["clients"] == 1
    assert state.params["merges"].tolist() == [[97, 98], [97, 99]]


def test_what_cannot_be_meant_is_refused_in_a_sentence():
    for setting in (
        {"vocab": 258}, {"share": 0.0}, {"pairs": 0}, {"min_silos": 0}, {"noise": 1.0}, {"noise": -1.0},
        {"noise": 1.0, "contribution": 10.0, "min_documents": 2},
    ):  # fmt: skip
        with pytest.raises(FedllmError, match="tokenizer"):
            byte_pairs(lambda round_number: ["a"], **setting)
    with pytest.raises(FedllmError, match="min_silos is 2"):
        learned({"a": WORDS})
    with pytest.raises(FedllmError, match="min_documents is 2"):
        learned({"a": WORDS[:1]}, min_silos=1)
    with pytest.raises(FedllmError, match="UTF-8"):
        learned({"a": ["a\ud800"] * 2}, min_silos=1)
    with pytest.raises(FedllmError, match="No silo"):
        algorithm = byte_pairs(lambda round_number: ["a", "b"])
        algorithm.server(algorithm.init({}), lambda requests: iter([]))


@pytest.mark.parametrize("merges", [[[97, 256]], [[-1, 97]], [[97, 98], [257, 97]]])
def test_a_silo_merges_only_symbols_that_there_are(merges):
    algorithm = byte_pairs(lambda round_number: ["a"], min_silos=1)
    state = algorithm.init({"merges": torch.tensor(merges, dtype=torch.int16)})
    with pytest.raises(FedllmError, match="symbols that there are not"):
        algorithm.server(state, exchange_over({"a": WORDS}, algorithm))


@given(st.text(alphabet="ab ", max_size=60), st.floats(0.5, 20))
@settings(deadline=None, max_examples=60)
def test_a_document_adds_no_more_than_its_bound_after_any_merges(text, bound):
    merges = np.array(learned({"a": [text]}, vocab=280, **LAX)[0], np.int64).reshape(-1, 2)
    for count in range(len(merges) + 1):
        pairs = count_pairs(merged(count_words([text], contribution=bound), merges[:count]), 0, 1)
        assert np.linalg.norm(pairs.counts_P) <= bound * (1 + 1e-9)


def test_noise_is_that_of_a_histogram_of_all_pairs_above_a_threshold():
    symbols, sigma, limit, trials = 50, 10.0, 160, 400
    exact = Pairs(np.array([3 << 32 | 4]), np.array([100.0]))
    drawn = [noised(exact, symbols, sigma, limit, np.random.default_rng(seed)) for seed in range(trials)]
    own = np.array([pairs.counts_P[pairs.keys_P == exact.keys_P[0]][0] for pairs in drawn])
    assert abs(own.mean() - 100) < 4 * sigma / trials**0.5
    assert abs(own.std() - sigma) < 1.5
    false = [len(pairs.keys_P) - 1 for pairs in drawn]
    assert abs(np.mean(false) - limit / 16) < 4 * (limit / 16 / trials) ** 0.5
    assert all((np.diff(pairs.keys_P) > 0).all() for pairs in drawn)
    random = np.random.default_rng(0)
    dense = random.normal(0, sigma, (trials, symbols**2))
    least = min(pairs.counts_P.min() for pairs in drawn)
    noise = np.concatenate([pairs.counts_P[pairs.keys_P != exact.keys_P[0]] for pairs in drawn])
    assert abs(noise.mean() - dense[dense > least].mean()) < 0.3


def test_with_noise_a_node_asked_again_says_the_same_and_another_node_something_else():
    silos = {"a": WORDS * 20}
    settings = {"min_silos": 1, "noise": 1.0, "contribution": 20.0, "vocab": 290}
    memory: dict = {}
    first, reports = learned(silos, memory=memory, **settings)
    memory = {"a": {"secret": memory["a"]["secret"]}}
    assert learned(silos, memory=memory, **settings)[0] == first
    assert reports[-1]["releases"] == len(reports)
    assert (reports[0]["noise_multiplier"], reports[0]["sensitivity"]) == (1.0, 20.0)
    assert learned(silos, **settings)[0] != first


def test_the_folder_is_one_that_transformers_loads(tmp_path):
    merges, _ = learned({"a": WORDS}, **LAX)
    make_tokenizer(merges).save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert (len(loaded), loaded.pad_token_id, loaded.bos_token_id, loaded.eos_token_id) == (259 + len(merges), 0, 1, 2)
    text = "Où? the cat\n  sat\t☃ <|eos|>"
    assert loaded.decode(loaded(text)["input_ids"]) == text
    assert loaded("the cat")["input_ids"] == make_tokenizer(merges)("the cat")["input_ids"]
    assert loaded(text)["input_ids"][-1] == loaded.eos_token_id


@pytest.mark.skipif(not SHARED.exists(), reason="the speeches are not on this machine")
def test_on_speeches_it_is_within_one_percent_of_the_pooled_tokenizer():
    with gzip.open(SHARED / "sotu.jsonl.gz") as file:
        rows = [json.loads(line) for line in file]
    eras = {"old": rows[:100:2], "middle": rows[100:170:3], "new": rows[170::3]}
    silos = {name: [row["text"][:20_000] for row in part] for name, part in eras.items()}
    held = [row["text"][:20_000] for row in rows[1::10]]

    def tokens(tokenizer):
        return sum(map(len, tokenizer(held)["input_ids"]))

    pooled = pooled_tokenizer([text for texts in silos.values() for text in texts], 2000)
    merges, _ = learned(silos, vocab=2000)
    assert len(merges) == 2000 - 259
    assert abs(tokens(make_tokenizer(merges)) / tokens(pooled) - 1) < 0.01
