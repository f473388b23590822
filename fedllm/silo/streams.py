"""Plain text as blocks of tokens: in memory where it is short, else tokenised once into a file of the user's cache.

The file is named by a hash of the texts and the tokenizer, so it is made again when one of them changes, and found
again by a run that goes on. It is as confidential as the text: only its owner can read it, and what was not used for
`DAYS` days is removed when another one is made.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np

from fedllm.core.errors import FedllmError
from fedllm.silo.examples import Example
from fedllm.silo.smollm2 import cache_folder
from fedllm.silo.templates import first_token

VERSION = 2
"""Of what is in a file; another version is another file."""

BATCH = 1 << 20
"""Characters that are tokenised at a time."""

SMALL = 1 << 24
"""Characters of a silo's text up to which its tokens are kept in memory."""

DAYS = 30


class Blocks(Sequence[Example]):
    """Tokens one after the other as blocks of `block` tokens, the last one shorter; made when asked for."""

    def __init__(self, tokens_N: np.ndarray, block: int) -> None:
        self.tokens_N, self.block = tokens_N, block

    def __len__(self) -> int:
        # What is left over at the end counts if there is something in it to predict.
        return (len(self.tokens_N) + self.block - 2) // self.block

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        start = range(len(self))[place] * self.block
        ids = self.tokens_N[start : start + self.block].tolist()
        return Example(ids, ids)


def packed(texts: Callable[[], Iterable[str]], tokenizer: Any, block: int) -> Blocks:
    """Return the blocks of texts joined as they are; `texts` is called more than once and yields the same ones.

    Memory does not grow with the texts.
    """
    digest, size = hashlib.blake2b(digest_size=16), 0
    for text in texts():
        digest.update(len(text).to_bytes(8, "big") + text.encode("utf-8", "surrogatepass"))
        size += len(text)
    kind = "uint16" if len(tokenizer) <= 1 << 16 else "uint32"
    if size <= SMALL:
        return Blocks(np.frombuffer(b"".join(tokenised(texts(), tokenizer, kind)), kind), block)
    said = json.dumps([VERSION, digest.hexdigest(), tokenizer_hash(tokenizer)])
    name = hashlib.sha256(said.encode()).hexdigest()[:32]
    return Blocks(np.memmap(kept(name, lambda: tokenised(texts(), tokenizer, kind)), kind, "r"), block)


def tokenised(texts: Iterable[str], tokenizer: Any, kind: str) -> Iterator[bytes]:
    """Yield the tokens of the texts as numbers of a kind, a batch of texts at a time."""
    waiting, size = list[str](), 0
    for text in texts:
        waiting.append(text)
        size += len(text)
        if size >= BATCH:
            yield numbers(waiting, tokenizer, kind)
            waiting, size = [], 0
    if waiting:
        yield numbers(waiting, tokenizer, kind)


def numbers(texts: Sequence[str], tokenizer: Any, kind: str) -> bytes:
    """Return the tokens of the texts, one text after the other."""
    return b"".join(np.array(ids, kind).tobytes() for ids in tokenizer(texts, add_special_tokens=False)["input_ids"])


def kept(name: str, make: Callable[[], Iterable[bytes]]) -> Path:
    """Return the file of that name in the user's cache, made unless it is there; it is there whole or not at all."""
    from filelock import FileLock

    folder = cache_folder() / "tokens"
    path = folder / f"{name}.tokens"
    try:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        with FileLock(folder / f"{name}.lock"):
            if not path.is_file():
                forget_old(folder)
                beside = path.with_suffix(".part")
                with open(beside, "wb", opener=lambda file, flags: os.open(file, flags, 0o600)) as file:
                    file.writelines(make())
                    file.flush()
                    os.fsync(file.fileno())
                beside.replace(path)
            os.utime(path)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FedllmError(
            f"The tokens of a text cannot be kept in {folder} ({reason}); make room there, or set FEDLLM_CACHE to "
            "another folder."
        ) from error
    return path


def forget_old(folder: Path) -> None:
    """Remove what was not used for long."""
    for path in folder.glob("*"):
        if path.stat().st_mtime < time.time() - DAYS * 86400:
            path.unlink(missing_ok=True)


def tokenizer_hash(tokenizer: Any) -> str:
    """Return the hash of all that decides a text's tokens."""
    if not tokenizer.is_fast:
        raise FedllmError(f"{type(tokenizer).__name__} cannot be hashed; use the model's fast tokenizer.")
    whole = [tokenizer.backend_tokenizer.to_str(), first_token(tokenizer), tokenizer.eos_token]
    return hashlib.sha256(json.dumps([str(each) for each in whole]).encode()).hexdigest()
