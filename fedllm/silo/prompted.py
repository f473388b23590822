"""A text prompt before a silo's examples: scored, and evaluated, with each prompt read once for all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from fedllm.core.texts import texts_in
from fedllm.core.types import Client, Reply, Request, Silo, Tensors
from fedllm.silo.candidates import Measure, Reader, scores_after
from fedllm.silo.evaluate import each_word, summary, text_before
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.reading import Read, read
from fedllm.silo.scoring import scored_tokens
from fedllm.silo.templates import first_token
from fedllm.silo.words import Contexts, label_scores, word_scores


def prompt_tokens(tokenizer: Any, text: str) -> list[int]:
    """Return a prompt as tokens: a line of its own, or nothing where it is empty."""
    ids: list[int] = tokenizer(f"{text}\n" if text else "", add_special_tokens=False)["input_ids"]
    return ids


def first_ids(tokenizer: Any) -> list[int]:
    """Return the token that every example of the model begins with, if there is one; a prompt stands behind it."""
    return [tokenizer.bos_token_id] if first_token(tokenizer) else []


def prompted(ids: Sequence[int], example: Example, at: int) -> Example:
    """Return the example with a prompt's tokens put in at a place."""
    labels = [*example.labels[:at], *[IGNORED] * len(ids), *example.labels[at:]]
    return Example([*example.input_ids[:at], *ids, *example.input_ids[at:]], labels)


def text_scores(
    reader: Reader, tokenizer: Any, prompts: Sequence[str], examples: Sequence[Example], measure: Measure
) -> Tensor:
    """Return the mean score of each text prompt before the examples, scores_P."""
    reader.model.eval()
    before, rest = read_prompts(reader, tokenizer, prompts, examples)
    return scores_after(reader, before, len(prompts), rest, measure)


def read_prompts(
    reader: Reader, tokenizer: Any, prompts: Sequence[str], examples: Sequence[Example]
) -> tuple[Read, list[Example]]:
    """Read the prompts, and return the examples without the first token, which is now read before the prompt."""
    head = first_ids(tokenizer)
    rows = [[*head, *prompt_tokens(tokenizer, text)] for text in prompts]
    _, before = read(reader.model, rows, None, reader.pad_id, min(map(len, rows)) - 1)
    reader.tick(sum(map(len, rows)))
    cut = len(head)
    return before, [Example(example.input_ids[cut:], example.labels[cut:]) for example in examples]


def cost_of(tokenizer: Any, prompts: Sequence[str], example: Example) -> int:
    """Return the tokens that an example takes with every prompt as a call of its own, as one is billed for them."""
    return sum(len(prompt_tokens(tokenizer, text)) + len(example.input_ids) for text in prompts)


def prompted_held_out(tokenizer: Any, words: Sequence[tuple[int, ...]], *, batch_size: int) -> Client:
    """Evaluate the text prompt that is sent on the silo's held-out text; with the scalar `base` none stands before it.

    Replies what `silo.evaluate.held_out` does.
    """

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        (text,) = [""] if request.scalars.get("base") else texts_in("prompt", request.tensors, most=1)
        ids, at = prompt_tokens(tokenizer, text), len(first_ids(tokenizer))
        rows = [prompted(ids, example, at) for example in silo.data["test"]]
        scalars = measured(silo.model, rows, words, tokenizer.pad_token_id, batch_size, silo.tick)
        return Reply(request.client, request.round, {}, max(1.0, scalars["scored"]), scalars), silo.memory

    return client


def measured(
    model: nn.Module,
    rows: Sequence[Example],
    words: Sequence[tuple[int, ...]],
    pad_id: int,
    batch_size: int,
    tick: Callable[[int], None],
) -> dict[str, float]:
    """Return loss, scored tokens and accuracy of whole rows."""
    asked = [each_word(row, words) for row in rows]
    if words:
        contexts = Contexts([text_before(each) for each in asked], [each.words for each in asked])
        found = word_scores(model, contexts, pad_id=pad_id, batch_size=batch_size, tick=tick)
        return summary(asked, [], [total for totals in found for total in totals], len(words))
    sums = label_scores(model, rows, [], pad_id=pad_id, before=None, batch_size=batch_size, tick=tick)
    scored = sum(map(scored_tokens, rows))
    return {"scored": float(scored), **({"loss": -sum(sums) / scored} if scored else {})}
