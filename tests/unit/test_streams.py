"""Text larger than memory becomes blocks that are those of the task, in an order that needs no list."""

from __future__ import annotations

import gzip
import json
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.silo import examples
from fedllm.silo.block_order import draws, permuted
from fedllm.silo.cleaning import utf8
from fedllm.silo.dedupe import exact_duplicates
from fedllm.silo.readers import read_file
from fedllm.silo.stream_rows import PIECE, stream_rows
from fedllm.silo.streams import Blocks, open_stream
from fedllm.silo.tasks import causal
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [f"the cat number {number} sat on the mat, où? {'x' * (number % 7)}" for number in range(60)]


def write(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def stream_of(path: Path, folder: Path, **settings):
    return open_stream([path], TOKENIZER, folder, **{"block": 16, **settings})


def rows_of(path: Path, bad="skip"):
    counts: Counter[str] = Counter()
    return list(stream_rows(path, bad, lambda what: counts.update([what]))), dict(counts)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz"])
def test_the_blocks_are_those_of_the_task(tmp_path, name):
    stream = stream_of(write(tmp_path / name, TEXTS), tmp_path / "cache", held_out=0.0)
    expected = causal(TOKENIZER, block=16).prepare([{"text": text} for text in TEXTS], "a").examples
    assert list(stream.train) == expected
    assert len(stream.test) == 0
    assert stream.train[-1] == expected[-1]
    assert stream.train[2:4] == expected[2:4]
    with pytest.raises(IndexError):
        stream.train[len(expected)]


@given(st.integers(0, 40), st.integers(2, 8))
def test_a_block_is_there_if_it_has_something_to_predict(tmp_path_factory, tokens, block):
    path = tmp_path_factory.mktemp("blocks") / "tokens"
    path.write_bytes(bytes(2 * tokens))
    blocks = Blocks(path, "uint16", block)
    starts = range(0, tokens, block)
    assert [len(each.input_ids) for each in blocks] == [n for s in starts if (n := min(block, tokens - s)) > 1]


def test_held_out_texts_are_apart_and_equal_ones_together(tmp_path):
    stream = stream_of(write(tmp_path / "a.jsonl", TEXTS * 2), tmp_path / "cache", held_out=0.3)
    texts = {}
    for part, blocks in (("train", stream.train), ("test", stream.test)):
        ids = [token for block in blocks for token in block.input_ids]
        texts[part] = TOKENIZER.decode(ids).split("<|im_end|>")[:-1]
        assert len(texts[part]) == stream.counts[f"{part}_rows"]
        assert len(ids) == stream.counts[f"{part}_tokens"]
    assert not set(texts["train"]) & set(texts["test"])
    assert sorted(texts["train"] + texts["test"]) == sorted(TEXTS * 2)
    assert 0.1 < len(texts["test"]) / 120 < 0.5


def test_a_file_is_made_once_and_again_when_something_changes(tmp_path):
    path, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    stream_of(path, cache)
    made = {file: file.stat().st_mtime_ns for file in cache.iterdir() if file.suffix != ".lock"}
    assert stream_of(path, cache, block=8).counts == stream_of(path, cache).counts
    assert {file: file.stat().st_mtime_ns for file in cache.iterdir() if file.suffix != ".lock"} == made
    for number, changed in enumerate(
        (
            lambda: stream_of(path, cache, steps=[exact_duplicates()]),
            lambda: stream_of(path, cache, steps=[utf8()]),
            lambda: stream_of(path, cache, seed=1),
            lambda: open_stream([path], tiny_tokenizer(merges=20), cache),
            lambda: stream_of(write(path, TEXTS[1:]), cache),
        ),
        start=2,
    ):
        changed()
        assert len(list(cache.glob("*.json"))) == number


def test_a_build_that_was_killed_is_made_again(tmp_path):
    path, cache = write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache"
    whole = list(stream_of(path, cache).train)
    next(cache.glob("*.json")).unlink()
    next(cache.glob("*.train.tokens")).write_bytes(b"half")
    assert list(stream_of(path, cache).train) == whole


def test_steps_and_empty_rows_are_counted(tmp_path):
    path = write(tmp_path / "a.jsonl", ["a", "a", "", "b"])
    stream = stream_of(path, tmp_path / "cache", steps=[exact_duplicates()], held_out=0.0)
    assert stream.counts == {
        "read": 4, "kept": 3, "0.exact_duplicates.dropped": 1, "empty": 1, "train_rows": 2, "train_tokens": 4,
    }  # fmt: skip


def test_lines_that_are_not_utf8_are_skipped_and_counted_or_refused(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\n{"text": "\xff"}\n\n{"text": "b"}\n')
    assert rows_of(path) == ([{"text": "a"}, {"text": "b"}], {"lines that are not UTF-8": 1})
    with pytest.raises(FedllmError, match="line 2: not UTF-8"):
        rows_of(path, "refuse")
    path = tmp_path / "a.txt"
    path.write_bytes("eins\nzw\xf6lf\ndreißig".encode("latin-1"))
    assert rows_of(path) == ([{"text": "eins\n"}], {"lines that are not UTF-8": 2})


def test_broken_files_are_named(tmp_path):
    path = tmp_path / "a.jsonl.gz"
    path.write_bytes(gzip.compress(b'{"text": "a"}\n' * 1000)[:-20])
    with pytest.raises(FedllmError, match="not a whole gzip file"):
        rows_of(path)
    path = tmp_path / "a.jsonl"
    for line, said in (("{", "broken JSON"), ("[1]", "not a JSON object")):
        path.write_text(f'{{"text": "a"}}\n{line}\n')
        with pytest.raises(FedllmError, match=f"line 2: {said}"):
            rows_of(path)
    with pytest.raises(FedllmError, match="cannot be read"):
        stream_of(tmp_path / "none.jsonl", tmp_path / "cache")
    with pytest.raises(FedllmError, match="no column 'body'"):
        stream_of(write(path, TEXTS), tmp_path / "cache", text="body")
    with pytest.raises(FedllmError, match="block is 1"):
        stream_of(path, tmp_path / "cache", block=1)


@pytest.mark.parametrize("lines", [True, False])
def test_a_long_text_file_is_several_rows_cut_between_characters(tmp_path, lines):
    letters = random.Random(0).choices(["ß", "☃", "😀", "a", "\n" if lines else "b"], k=PIECE)
    text = "".join(letters)
    (tmp_path / "a.txt").write_text(text, newline="")
    rows, counts = rows_of(tmp_path / "a.txt")
    assert "".join(row["text"] for row in rows) == text
    assert len(rows) > 1
    assert not counts
    assert max(len(row["text"].encode()) for row in rows) < 2 * PIECE + 8


@pytest.mark.parametrize("name", ["a.csv", "a.json"])
def test_other_files_are_read_as_a_whole(tmp_path, name):
    (tmp_path / "a.csv").write_text("text\nhello\n")
    (tmp_path / "a.json").write_text('[{"text": "hello"}]')
    assert rows_of(tmp_path / name)[0] == read_file(tmp_path / name) == [{"text": "hello"}]


@given(st.integers(1, 300), st.integers(0, 2**62))
@settings(max_examples=40)
def test_an_epoch_is_every_block_once(size, seed):
    assert sorted(permuted(place, size, seed) for place in range(size)) == list(range(size))


def test_epochs_differ_and_leave_no_trace_of_the_order():
    orders = [[permuted(place, 1000, seed) for place in range(1000)] for seed in range(30)]
    assert len({tuple(order) for order in orders}) == 30
    # Of a random order the mean distance between neighbours is a third of the size, with little spread over 30.
    steps = [abs(left - right) for order in orders for left, right in pairwise(order)]
    assert abs(sum(steps) / len(steps) - 333) < 10
    fixed = sum(place == to for order in orders for place, to in enumerate(order))
    assert fixed < 70  # one an order is to be expected


def test_a_batch_depends_on_its_number_alone(tmp_path):
    blocks = stream_of(write(tmp_path / "a.jsonl", TEXTS), tmp_path / "cache").train
    straight = list(draws(blocks, 4, 0, 60, seed=3))
    assert [*draws(blocks, 4, 0, 25, seed=3), *draws(blocks, 4, 25, 35, seed=3)] == straight
    first = [block for batch in straight for block in batch][: len(blocks)]
    assert sorted(first) == sorted(blocks)
    assert list(draws(blocks, 4, 0, 60, seed=4)) != straight
    assert sorted(row for rows in examples.draws(blocks, 1, 0, len(blocks), seed=3) for row in rows) == sorted(blocks)


MEASURE = """
import re, sys
from pathlib import Path
from fedllm.silo.streams import open_stream
from fedllm.silo import examples
from fedllm.silo.block_order import draws
from tests.tiny import tiny_tokenizer
folder = Path(sys.argv[1])
tokenizer = tiny_tokenizer(merges=0)
open_stream([folder / "small.jsonl.gz"], tokenizer, folder / "cache")
def peak():  # of this process alone: what `resource` tells starts at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
before = peak()
stream = open_stream([folder / "large.jsonl.gz"], tokenizer, folder / "cache")
for batch in draws(stream.train, 8, 0, 20, 0):
    pass
print(peak() - before, len(stream.train))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's peak memory")
def test_memory_does_not_grow_with_the_file(tmp_path):
    line = json.dumps({"text": "the cat sat on the mat " * 40}) + "\n"
    for name, lines in (("small", 700), ("large", 4_200)):
        with gzip.open(tmp_path / f"{name}.jsonl.gz", "wt", compresslevel=1) as file:
            file.writelines(line.replace("cat", f"cat {number}", 1) for number in range(lines))
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)], cwd=root, capture_output=True, text=True, check=True
    )
    more_kib, blocks = map(int, done.stdout.split())
    assert blocks * 256 > 3_000_000  # tokens, of two bytes each
    assert more_kib < 64 * 1024  # in one batch it is over 300 MiB
