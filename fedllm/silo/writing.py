"""What a model writes when it is asked something, seeded."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fedllm.silo.reading import plain
from fedllm.silo.templates import Turn, opening

MOST = 64
"""Tokens that are written at most."""


def writing(model: nn.Module, tokenizer: Any, temperature: float = 0.9) -> Callable[[str, int], tuple[str, int]]:
    """Return `write(question, seed)`: the model's answer and the tokens that it read and wrote."""

    def write(question: str, seed: int) -> tuple[str, int]:
        text = opening(tokenizer, [Turn("user", question)], bool(tokenizer.chat_template))
        device = next(model.parameters()).device
        asked = tokenizer(text, add_special_tokens=False, return_tensors="pt").to(device)
        model.eval()
        base: Any = plain(model)
        with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []), torch.no_grad():
            torch.manual_seed(seed % (1 << 63))
            made = base.generate(
                input_ids=asked["input_ids"],
                attention_mask=asked["attention_mask"],
                do_sample=True,
                temperature=temperature,
                max_new_tokens=MOST,
                pad_token_id=tokenizer.pad_token_id,
            )
        new = made[0, asked["input_ids"].shape[1] :]
        return tokenizer.decode(new, skip_special_tokens=True), int(made.numel())

    return write
