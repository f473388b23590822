"""Text larger than memory: tokenised once into a file, and read from there in blocks, in any order.

The file is named by a hash of the sources, the tokenizer and the cleaning steps, so it is made again when one of them
changes. It holds the silo's text as tokens and is as confidential as that.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple, overload

import numpy as np

from fedllm.core.errors import FedllmError
from fedllm.silo.cleaning import Step, cleaned
from fedllm.silo.examples import Example
from fedllm.silo.sources import Row, require_columns
from fedllm.silo.stream_rows import stream_rows
from fedllm.silo.templates import first_token

VERSION = 1
"""Of what is in a file; another version is another file."""

BATCH = 1 << 20
"""Characters that are tokenised at a time."""


class Stream(NamedTuple):
    """A silo's blocks of tokens by split, and what was counted when they were made."""

    train: Blocks
    test: Blocks
    counts: dict[str, int]


class Blocks(Sequence[Example]):
    """Tokens in a file as blocks of `block` tokens, the last one shorter; read when asked for."""

    def __init__(self, path: Path, kind: str, block: int) -> None:
        empty = path.stat().st_size == 0  # which cannot be mapped
        self.tokens: np.ndarray = np.zeros(0, kind) if empty else np.memmap(path, kind, "r")
        self.block = block

    def __len__(self) -> int:
        # What is left over at the end counts if there is something in it to predict.
        return (len(self.tokens) + self.block - 2) // self.block

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        start = range(len(self))[place] * self.block
        ids = self.tokens[start : start + self.block].tolist()
        return Example(ids, ids)


def open_stream(
    sources: Sequence[Path],
    tokenizer: Any,
    folder: Path,
    *,
    block: int = 256,
    text: str = "text",
    steps: Sequence[Step] = (),
    bad: Literal["skip", "refuse"] = "skip",
    held_out: float = 0.1,
    seed: int = 0,
) -> Stream:
    """Return the blocks of files of rows, tokenised into `folder` unless that was done before.

    Texts are joined by the end token, as in the task `causal`. A text is held out by its own hash, so equal texts are
    on one side. Memory does not grow with the files, but for what the steps remember of the rows.
    """
    from filelock import FileLock

    if block < 2:
        raise FedllmError(f"task.block is {block}; it must be at least 2.")
    said = [VERSION, text, bad, held_out, seed, [[step.name, dict(step.settings)] for step in steps]]
    name = name_of([*map(file_hash, sources), tokenizer_hash(tokenizer), json.dumps(said, sort_keys=True)])
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    files = {part: folder / f"{name}.{part}.tokens" for part in ("train", "test")}
    kind = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    with FileLock(folder / f"{name}.lock"):
        if not (folder / f"{name}.json").is_file():
            counts: Counter[str] = Counter()
            rows = cleaned(rows_of(sources, bad, counts), steps, counts)
            is_test = partial(lies_below, share=held_out, seed=seed)
            write_tokens(rows, tokenizer, text, files, kind, is_test, counts)
            write_whole(folder / f"{name}.json", json.dumps(counts).encode())
    counts = Counter(json.loads((folder / f"{name}.json").read_bytes()))
    train, test = (Blocks(files[part], kind, block) for part in ("train", "test"))
    return Stream(train, test, dict(counts))


def rows_of(sources: Sequence[Path], bad: Literal["skip", "refuse"], counts: Counter[str]) -> Iterator[Row]:
    """Yield the rows of all files."""
    for source in sources:
        yield from stream_rows(source, bad, lambda what: counts.update([what]))


def write_tokens(
    rows: Iterable[Row],
    tokenizer: Any,
    text: str,
    files: dict[str, Path],
    kind: str,
    is_test: Callable[[str], bool],
    counts: Counter[str],
) -> None:
    """Tokenise the rows into the files, a batch of texts at a time; a file is there only when it is whole."""
    before, waiting, size = first_token(tokenizer), {part: list[str]() for part in files}, 0
    beside = {part: path.with_suffix(".part") for part, path in files.items()}
    with ExitStack() as stack:
        opened = {part: stack.enter_context(path.open("wb")) for part, path in beside.items()}

        def flush() -> None:
            for part, texts in waiting.items():
                for ids in tokenizer(texts, add_special_tokens=False)["input_ids"] if texts else []:
                    opened[part].write(np.array(ids, kind).tobytes())
                    counts[f"{part}_tokens"] += len(ids)
                texts.clear()

        for row in rows:
            require_columns([row], [text], "A row of the text")
            said = str(row[text] or "")
            if not said:
                counts["empty"] += 1
                continue
            part = "test" if is_test(said) else "train"
            waiting[part].append(f"{before}{said}{tokenizer.eos_token}")
            counts[f"{part}_rows"] += 1
            size += len(said)
            if size >= BATCH:
                flush()
                size = 0
        flush()
        for file in opened.values():
            file.flush()
            os.fsync(file.fileno())
    for part, path in files.items():
        beside[part].replace(path)


def write_whole(path: Path, data: bytes) -> None:
    """Write a file so that it is there whole or not at all."""
    beside = path.with_suffix(".part")
    beside.write_bytes(data)
    beside.replace(path)


def lies_below(text: str, share: float, seed: int) -> bool:
    """Say whether a text's own place between 0 and 1 is below `share`."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, key=str(seed).encode()).digest()
    return int.from_bytes(digest, "big") < share * 2.0**64


def name_of(parts: Sequence[str]) -> str:
    """Return one hash of several."""
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:32]


def file_hash(path: Path) -> str:
    """Return the hash of a file's bytes, without holding them."""
    try:
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise FedllmError(f"{path} cannot be read ({error.strerror}); give the path of a file.") from error


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of all that decides a text's tokens."""
    if not tokenizer.is_fast:
        raise FedllmError(f"{type(tokenizer).__name__} cannot be hashed; use the model's fast tokenizer.")
    whole = [tokenizer.backend_tokenizer.to_str(), first_token(tokenizer), tokenizer.eos_token]
    return name_of([str(each) for each in whole])
