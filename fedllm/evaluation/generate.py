"""Text that a model writes: many conversations at once, or one of them piece by piece."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby
from threading import Event, Thread
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.core.types import ignore
from fedllm.silo.fit import seeded
from fedllm.silo.templates import Turn, opening


def complete(
    model: nn.Module,
    tokenizer: Any,
    conversations: Sequence[Sequence[Turn]],
    *,
    max_new_tokens: int = 256,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
    tick: Callable[[int], None] = ignore,
) -> list[str]:
    """Return what the assistant says next in each conversation, up to the end token.

    At temperature 0 the likeliest token is always taken. The tokenizer's chat template is used if it
    has one; without it a next `Question:` ends the answer too. `tick` is told the tokens written.
    """
    asked = [prompt_ids(tokenizer, turns) for turns in conversations]
    written = [""] * len(asked)
    settings = how(model, tokenizer, max_new_tokens, temperature, top_p)
    for places in batches([len(ids) for ids in asked], batch_size, padded=not has_soft_prompt(model)):
        rows = [asked[place] for place in places]
        new_BT = write(model, rows, settings, derive(seed, "complete", places[0]))
        texts = tokenizer.batch_decode(new_BT, skip_special_tokens=True)
        for place, text in zip(places, texts, strict=True):
            written[place] = (text if tokenizer.chat_template else text.partition("\nQuestion:")[0]).strip()
        tick(new_BT.numel())
    return written


def chat_once(
    model: nn.Module,
    tokenizer: Any,
    history: Sequence[Turn],
    *,
    max_new_tokens: int = 512,
    temperature: float = 0.0,
    seed: int = 0,
) -> Iterator[str]:
    """Yield what the assistant says next as it is written; closing the iterator stops the model."""
    from transformers import StoppingCriteriaList, TextIteratorStreamer

    asked = prompt_ids(tokenizer, history)
    settings = how(model, tokenizer, max_new_tokens, temperature)
    streamer = TextIteratorStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    stopped, failures = Event(), list[Exception]()

    def stop(so_far: Tensor, scores: Any, **_: Any) -> Tensor:
        return torch.full((len(so_far),), stopped.is_set(), device=so_far.device)

    def work() -> None:
        own: dict[str, Any] = {"streamer": streamer, "stopping_criteria": StoppingCriteriaList([stop])}
        try:
            write(model, [asked], settings, derive(seed, "chat", len(history)), **own)
        except Exception as error:  # whatever it is, it belongs to the one who reads
            failures.append(error)
            streamer.on_finalized_text("", stream_end=True)

    thread = Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from (piece for piece in streamer if piece)
    finally:
        stopped.set()
        thread.join()
    if failures:
        raise failures[0]


def write(model: nn.Module, rows: Sequence[list[int]], settings: Any, seed: int, **how_to_stream: Any) -> Tensor:
    """Return the tokens that follow each row of tokens, as new_BT."""
    width, device = max(map(len, rows)), next(model.parameters()).device
    # Padded on the left, so that all prompts end together.
    ids = [[settings.pad_token_id] * (width - len(row)) + row for row in rows]
    mask = [[0] * (width - len(row)) + [1] * len(row) for row in rows]
    model.eval()
    with torch.no_grad(), seeded(seed, device), warnings.catch_warnings():
        # peft and transformers warn about what they pass to one another.
        warnings.simplefilter("ignore")
        out_BT: Tensor = model.generate(  # type: ignore[operator]
            input_ids=torch.tensor(ids, device=device),
            attention_mask=torch.tensor(mask, device=device),
            generation_config=settings,
            **how_to_stream,
        )
    return out_BT[:, width:]


def prompt_ids(tokenizer: Any, turns: Sequence[Turn]) -> list[int]:
    """Return the conversation's tokens up to where the assistant speaks next."""
    if not turns or turns[-1].role == "assistant":
        raise FedllmError("The assistant has nothing to answer; end the conversation with a user's message.")
    text = opening(tokenizer, turns, chat=bool(tokenizer.chat_template))
    return list(tokenizer(text, add_special_tokens=False)["input_ids"])


def batches(lengths: Sequence[int], batch_size: int, padded: bool) -> Iterator[list[int]]:
    """Yield the places of prompts answered together, longest first; of one length each unless `padded`."""
    order = sorted(range(len(lengths)), key=lambda place: -lengths[place])
    for _, group in groupby(order, key=lambda place: 0 if padded else lengths[place]):
        places = list(group)
        for first in range(0, len(places), batch_size):
            yield places[first : first + batch_size]


def has_soft_prompt(model: nn.Module) -> bool:
    """Say whether learned tokens stand before the text; padding behind them would shift its positions."""
    config = getattr(model, "active_peft_config", None)
    return bool(config is not None and config.is_prompt_learning)


def how(model: nn.Module, tokenizer: Any, max_new_tokens: int, temperature: float, top_p: float = 1.0) -> Any:
    """Return the settings of a generation, which ends at the tokenizer's end token and at the model's own."""
    from transformers import GenerationConfig

    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    ends = {tokenizer.eos_token_id, *(own if isinstance(own, list) else [own])} - {None}
    sampling = {"temperature": temperature, "top_k": 0, "top_p": top_p} if temperature > 0 else {}
    return GenerationConfig(
        max_new_tokens=max_new_tokens,
        do_sample=temperature > 0,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id,
        **sampling,
    )
