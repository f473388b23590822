"""A tiny Llama and a byte-level tokenizer, made on the spot, for tests."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

WORDS = ["the cat sat on the mat", "Question: Answer: Label: positive negative", "Sure, here is an answer."]
"""What the few merges are learned from, so that some words are one token and others many."""


def tiny_tokenizer(chat: bool = False, merges: int = 48) -> PreTrainedTokenizerFast:
    """Return a tokenizer that takes any text; it ends with `<|im_end|>` and has ChatML with `chat`."""
    bytes_first = pre_tokenizers.ByteLevel.alphabet()
    special = ["<pad>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=len(special) + len(bytes_first) + merges,
        special_tokens=special,
        initial_alphabet=bytes_first,
        min_frequency=1,
        show_progress=False,
    )
    tokenizer.train_from_iterator(WORDS, trainer)
    wrapped: PreTrainedTokenizerFast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<pad>",
        clean_up_tokenization_spaces=False,
    )
    wrapped.chat_template = CHATML if chat else None
    return wrapped


def tiny_model(vocab: int = 307, seed: int = 0, layers: int = 2, hidden: int = 32, heads: int = 4) -> LlamaForCausalLM:
    """Return a seeded Llama, frozen and in eval mode; float32."""
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=hidden,
        intermediate_size=2 * hidden,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=heads // 2,
        max_position_embeddings=512,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        tie_word_embeddings=True,
        # Larger than usual: an untrained model then has opinions, and tests something to compare.
        initializer_range=0.2,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config)
    model.requires_grad_(False)
    model.train(False)
    return model


def write_model(folder: Path, chat: bool = False) -> None:
    """Write the tiny model and its tokenizer as one folder."""
    tiny_model().save_pretrained(folder)
    tiny_tokenizer(chat=chat).save_pretrained(folder)


def write_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write rows as JSON lines."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
