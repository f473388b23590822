"""Text larger than memory becomes blocks that are those of the task, in an order that needs no list."""

from __future__ import annotations

import gzip
import json
import os
import random
import subprocess
import sys
from collections import Counter
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.app.config import read_recipe
from fedllm.app.data import open_shards
from fedllm.core.errors import FedllmError
from fedllm.silo import examples, spooled, streams
from fedllm.silo.block_order import permuted
from fedllm.silo.examples import Example, Joined, Together, draws
from fedllm.silo.partition import by_column, iid
from fedllm.silo.readers import read_file
from fedllm.silo.sources import hold_out
from fedllm.silo.stream_rows import PIECE, stream_rows
from fedllm.silo.streams import Blocks, packed
from fedllm.silo.tasks import causal
from fedllm.silo.templates import first_token
from tests.tiny import tiny_tokenizer

TOKENIZER = tiny_tokenizer()
TEXTS = [f"the cat number {number} sat on the mat, où? {'x' * (number % 7)}" for number in range(60)]


def write(path: Path, texts: list[str]) -> Path:
    data = "".join(json.dumps({"text": text}) + "\n" for text in texts).encode()
    path.write_bytes(gzip.compress(data) if path.suffix == ".gz" else data)
    return path


def packed_of(texts: list[str], block: int = 16, tokenizer=TOKENIZER) -> Blocks:
    return packed(lambda: iter(texts), tokenizer, block)


def rows_of(path: Path, bad="skip"):
    counts: Counter[str] = Counter()
    return list(stream_rows(path, bad, lambda what: counts.update([what]))), dict(counts)


@pytest.fixture
def on_disk(monkeypatch, tmp_path):
    """Let all that is read lie on disk, below this folder."""
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(streams, "SMALL", 0)
    monkeypatch.setattr(spooled, "SMALL", 0)
    return tmp_path / "cache"


def one_by_one(texts: list[str], block: int) -> list[Example]:
    """The blocks as their definition says, with nothing streamed."""
    ids = [token for text in texts for token in TOKENIZER(text, add_special_tokens=False)["input_ids"]]
    return [Example(each, each) for at in range(0, len(ids), block) if len(each := ids[at : at + block]) > 1]


def test_blocks_are_the_joined_texts_in_memory_and_on_disk(on_disk, monkeypatch):
    expected = one_by_one([f"{first_token(TOKENIZER)}{text}<|im_end|>" for text in TEXTS], 16)
    task = causal(TOKENIZER, block=16)
    rows = [{"text": text} for text in [*TEXTS, ""]]
    far = task.prepare(rows, "a")
    assert len(list(on_disk.glob("tokens/*.tokens"))) == 1
    monkeypatch.setattr(streams, "SMALL", 1 << 20)
    near = task.prepare(rows, "a")
    assert list(far.examples) == list(near.examples) == expected
    assert far.skipped == near.skipped == 1
    assert far.examples[-1] == expected[-1]
    assert far.examples[2:4] == expected[2:4]
    with pytest.raises(IndexError):
        far.examples[len(expected)]


@given(st.integers(0, 40), st.integers(2, 8))
@settings(deadline=None)
def test_a_block_is_there_if_it_has_something_to_predict(tokens, block):
    blocks = Blocks(np.zeros(tokens, "uint16"), block)
    starts = range(0, tokens, block)
    assert [len(each.input_ids) for each in blocks] == [n for s in starts if (n := min(block, tokens - s)) > 1]


def test_a_file_is_made_once_and_again_when_something_changes(on_disk):
    def made() -> dict[Path, int]:
        return {file: file.stat().st_ino for file in on_disk.glob("tokens/*.tokens")}

    packed_of(TEXTS)
    first = made()
    assert len(packed_of(TEXTS, block=8)) > len(packed_of(TEXTS)) and made() == first
    packed_of(TEXTS[1:])
    packed_of(["".join(TEXTS[:2]), *TEXTS[2:]])
    packed_of(TEXTS, tokenizer=tiny_tokenizer(merges=20))
    assert len(made()) == 4
    assert all(file.stat().st_mode & 0o077 == 0 for file in made())


def test_a_file_that_a_kill_left_half_is_made_again_and_an_old_one_goes(on_disk):
    whole = list(packed_of(TEXTS))
    (file,) = on_disk.glob("tokens/*.tokens")
    file.unlink()
    file.with_suffix(".part").write_bytes(b"half")
    assert list(packed_of(TEXTS)) == whole
    os.utime(file, (0, 0))
    packed_of(TEXTS[1:])
    assert not file.exists()


def test_rows_on_disk_are_those_in_memory(on_disk):
    rows = [{"text": text, "year": number} for number, text in enumerate(TEXTS)]
    far = spooled.spooled(iter(rows))
    assert isinstance(far, spooled.Spooled) and list(far) == rows
    assert not any(on_disk.iterdir())  # the file has no name that a kill could leave
    assert list(far[3:9]) == rows[3:9] and far[-1] == rows[-1] and list(far[3:9][2:4]) == rows[5:7]
    for one, other in zip(hold_out(far, 0.3), hold_out(rows, 0.3), strict=True):
        assert list(one) == other and isinstance(other, list)
    assert list(by_column(far, "year")["7"]) == [rows[7]]
    assert {name: list(part) for name, part in iid(far, 3).items()} == iid(rows, 3)


def test_a_silo_is_the_same_in_memory_and_on_disk(on_disk, monkeypatch, tmp_path):
    texts = [*TEXTS, *TEXTS[:7], "", "caf\u00e9"]
    data = (
        "".join(json.dumps({"said": text}) + "\n" for text in texts).encode()
        + b'{"said": "\xff"}\n{"said": "\\ud800"}\n'
    )
    (tmp_path / "a.jsonl").write_bytes(data)
    table = {"task": "causal", "data": {"root": str(tmp_path), "limit_test": 5, "limit_train": 40}}
    table |= {
        "silos": {"a": {"train": "a.jsonl", "columns": {"text": "said"}}},
        "cleaning": [{"name": "exact_duplicates"}],
    }
    far = open_shards(read_recipe(table))["a"]
    monkeypatch.setattr(spooled, "SMALL", 1 << 20)
    near = open_shards(read_recipe(table))["a"]
    assert (list(far.train), list(far.test), far.cleaned) == (near.train, near.test, near.cleaned)
    assert not isinstance(far.train, list)
    assert near.cleaned == {
        "read": 69, "0.exact_duplicates.dropped": 7, "kept": 62, "lines that are not UTF-8": 2,
    }  # fmt: skip
    table["data"] |= {"not_utf8": "refuse"}
    with pytest.raises(FedllmError, match="line 70: not UTF-8"):
        open_shards(read_recipe(table))


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
        rows_of(tmp_path / "none.jsonl")
    with pytest.raises(FedllmError, match="block is 1"):
        causal(TOKENIZER, block=1)


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
@settings(max_examples=40, deadline=None)
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


def test_a_batch_depends_on_its_number_alone(monkeypatch):
    blocks = packed_of(TEXTS)
    listed = [rows for rows in draws(blocks, 1, 0, len(blocks), seed=3)]
    monkeypatch.setattr(examples, "LISTED", 4)
    straight = list(draws(blocks, 4, 0, 60, seed=3))
    assert [*draws(blocks, 4, 0, 25, seed=3), *draws(blocks, 4, 25, 35, seed=3)] == straight
    first = [block for batch in straight for block in batch][: len(blocks)]
    assert sorted(first) == sorted(blocks) == sorted(row for rows in listed for row in rows)
    assert list(draws(blocks, 4, 0, 60, seed=4)) != straight


def test_a_batch_of_several_silos_together_is_their_own_batches_side_by_side():
    parts = [packed_of(TEXTS[:20]), packed_of(TEXTS[20:])]
    together = list(draws(Together([(parts[0], 5), (parts[1], 6)], 3), 6, 2, 4, seed=9))
    own = [list(draws(part, 3, 2, 4, seed)) for part, seed in zip(parts, (5, 6), strict=True)]
    assert together == [one + other for one, other in zip(*own, strict=True)]
    joined = Joined(parts)
    assert list(joined) == [*parts[0], *parts[1]] and joined[-1] == parts[1][-1]
    assert joined[len(parts[0])] == parts[1][0]


MEASURE = """
import json, os, re, sys
from pathlib import Path
import fedllm.silo.spooled, fedllm.silo.streams
from fedllm.app.config import read_recipe
from fedllm.app.data import Silos, open_shards
from fedllm.silo.examples import draws
from fedllm.silo.tasks import causal
from fedllm.silo.templates import first_token
from tests.tiny import tiny_tokenizer
fedllm.silo.spooled.SMALL = fedllm.silo.streams.SMALL = fedllm.silo.streams.BATCH = 1 << 18
folder = Path(sys.argv[1])
tokenizer = tiny_tokenizer(merges=0)
def peak():  # of this process alone: what `resource` tells starts at the parent's
    return int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
def read(name):
    table = {"task": "causal", "silos": {"a": str(folder / name)}, "cleaning": [{"name": "utf8"}]}
    silos = Silos(open_shards(read_recipe(table)), causal(tokenizer, block=256))
    train = silos.examples("a")["train"]
    for batch in draws(train, 8, 0, 20, 0):
        pass
    return len(train)
read("small.jsonl")
before = peak()
blocks = read("large.jsonl")
print(peak() - before, blocks)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="this system does not tell a process's peak memory")
def test_memory_does_not_grow_with_the_file(tmp_path):
    line = json.dumps({"text": "the cat sat on the mat " * 40}) + "\n"
    for name, lines in (("small", 700), ("large", 4_000)):
        with (tmp_path / f"{name}.jsonl").open("w") as file:
            file.writelines(line.replace("cat", f"cat {number}", 1) for number in range(lines))
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, str(tmp_path)],
        capture_output=True,
        text=True,
        check=True,
        cwd=root,
        env={**os.environ, "FEDLLM_CACHE": str(tmp_path / "cache")},
    )
    kilobytes, blocks = map(int, done.stdout.split())
    assert blocks > 10_000
    # The file has 3.7 MB and its tokens 7.4, of which what was read is counted though it can be let go of at any time;
    # as Python's lists they have 150.
    assert kilobytes < 32_000
