"""A model from nothing: a Llama whose one dial is its depth, or any transformers configuration with fresh weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedllm.core.errors import FedllmError

HEAD = 64
"""Values a head of attention has; the width is one head a layer, as in nanochat's dial."""


def llama(vocab: int, *, depth: int = 4, context: int = 512) -> Any:
    """Return the configuration of a Llama of `depth` layers and `64 * depth` width.

    It has about 12 * depth * width^2 weights and one table of tokens, used at both ends.

    >>> config = llama(4096, depth=4)
    >>> config.hidden_size, config.num_attention_heads, config.intermediate_size
    (256, 4, 704)
    """
    from transformers import LlamaConfig

    if depth < 1:
        raise FedllmError(f"scratch.depth is {depth}; it must be at least 1.")
    width = HEAD * depth
    return LlamaConfig(
        vocab_size=vocab,
        hidden_size=width,
        intermediate_size=64 * math.ceil(width * 8 / 3 / 64),
        num_hidden_layers=depth,
        num_attention_heads=depth,
        num_key_value_heads=depth,
        max_position_embeddings=context,
        tie_word_embeddings=True,
    )


def configuration(source: str, vocab: int) -> Any:
    """Return the configuration in a folder, file or hub id, with the tokenizer's number of tokens."""
    from transformers import AutoConfig

    try:
        config = AutoConfig.from_pretrained(source)
    except (OSError, ValueError) as error:
        reason = str(error).split("\n")[0].rstrip(".")
        raise FedllmError(f"scratch.config '{source}' is no transformers configuration ({reason}).") from error
    config.vocab_size = vocab
    return config


def fresh_model(config: Any, tokenizer: Any, seed: int) -> nn.Module:
    """Return a model of that configuration with seeded weights in float32, which knows the tokenizer's ends."""
    from transformers import AutoModelForCausalLM

    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(config, key, getattr(tokenizer, key))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model: nn.Module = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    return model


def write_start(model: Any, tokenizer: Any, folder: Path) -> None:
    """Write the model and its tokenizer as an ordinary transformers folder."""
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
