"""A tokenizer that transformers loads, from a list of merges, and the one that pooled text would give."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from fedllm.silo.token_counts import BYTES, pre_tokenizer

SPECIAL = {"pad_token": "<|pad|>", "bos_token": "<|bos|>", "eos_token": "<|eos|>"}
"""The tokens that no text has, in the order of their ids."""


def make_tokenizer(merges: Sequence[Sequence[int]]) -> Any:
    """Return a `PreTrainedTokenizerFast` of these merges over bytes: special tokens first, then bytes, then merges.

    A merge is two symbols (see `token_counts`). `save_pretrained` makes the folder that `AutoTokenizer` loads.
    """
    from tokenizers import Tokenizer, models

    letters = byte_letters()
    spelled = list(letters)
    for left, right in merges:
        spelled.append(spelled[left] + spelled[right])
    tokens = [*SPECIAL.values(), *sorted(letters), *spelled[BYTES:]]
    pairs = [(spelled[left], spelled[right]) for left, right in merges]
    return wrapped(Tokenizer(models.BPE(vocab={token: place for place, token in enumerate(tokens)}, merges=pairs)))


def pooled_tokenizer(texts: Iterable[str], vocab: int) -> Any:
    """Return the tokenizer that the `tokenizers` library learns from all texts in one place, for comparison."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL.values()),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        min_frequency=2,
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return wrapped(tokenizer)


def wrapped(tokenizer: Any) -> Any:
    """Return a tokenizer of the library as one of transformers, with our words and special tokens."""
    from tokenizers import decoders
    from transformers import PreTrainedTokenizerFast

    tokenizer.pre_tokenizer = pre_tokenizer()
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False, **SPECIAL)


def byte_letters() -> list[str]:
    """Return the letter that stands for each byte in a byte-level vocabulary: itself where that can be printed.

    >>> letters = byte_letters(); letters[ord("a")], letters[ord(" ")], len(set(letters))
    ('a', 'Ġ', 256)
    """
    from tokenizers import pre_tokenizers

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    others = iter(letter for letter in alphabet if ord(letter) >= BYTES)
    return [chr(value) if chr(value) in alphabet else next(others) for value in range(BYTES)]
