"""The start of a run from nothing: a tokenizer that the silos learn together, and a model with fresh weights."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any

from fedllm.algorithms.tokenizer import byte_pairs, learn
from fedllm.app.config import Recipe
from fedllm.app.data import open_shards
from fedllm.app.progress import Ui
from fedllm.app.quiet import quiet_libraries
from fedllm.app.rows import Shard
from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.core.types import Silo
from fedllm.exchange.accounting import Mechanism, epsilon
from fedllm.exchange.select import everyone
from fedllm.runtime.local import local
from fedllm.runtime.meter import Traffic, metered
from fedllm.silo.models import load_tokenizer
from fedllm.silo.readers import Row
from fedllm.silo.scratch import configuration, fresh_model, llama, write_start
from fedllm.silo.spooled import Mapped
from fedllm.silo.token_files import make_tokenizer, pooled_tokenizer

FEDERATED = "federated"


def start(recipe: Recipe, folder: Path, ui: Ui, keep: bool = True) -> dict[str, Any]:
    """Write the model that a recipe's [scratch] describes as a transformers folder; return what is told of it.

    Canaries that are made now are written to their silo's file, unless `keep` is false.
    """
    scratch = recipe.scratch
    assert scratch is not None
    require_fit(recipe)
    quiet_libraries()
    told: dict[str, Any] = {}
    if scratch.tokenizer == FEDERATED:
        with ui.part("learning the tokenizer", None):
            tokenizer, told = learned(recipe, keep)
        ui.say(
            f"tokenizer of {told['vocab']:,} tokens learned in {told['rounds']} rounds: {told['tokens_per_byte']:.4f} "
            f"tokens a byte"
            + (f", epsilon {told['epsilon']:.3g} of a record for its counts" if "epsilon" in told else "")
            + (f", pooled {told['pooled_tokens_per_byte']:.4f}" if "pooled_tokens_per_byte" in told else "")
        )
    else:
        tokenizer = load_tokenizer(scratch.tokenizer)
    tokens = len(tokenizer)
    config = (
        configuration(scratch.config, tokens)
        if scratch.config
        else llama(tokens, depth=scratch.depth, context=scratch.context)
    )
    model = fresh_model(config, tokenizer, derive(recipe.seed, "start"))
    write_start(model, tokenizer, folder)
    return told | {"parameters": sum(value.numel() for value in model.parameters())}


def require_fit(recipe: Recipe) -> None:
    """Raise where the rest of a recipe does not fit a model from nothing."""
    scratch, rows = recipe.scratch, int(recipe.task.get("block", recipe.task.get("max_tokens", 256)))
    if recipe.trainable.get("name") != "full":
        raise FedllmError("A model from nothing has nothing to adapt; set trainable.name = 'full'.")
    if scratch and not scratch.config and rows > scratch.context:
        raise FedllmError(f"scratch.context is {scratch.context}, but rows have up to {rows} tokens; raise it.")


def learned(recipe: Recipe, keep: bool) -> tuple[Any, dict[str, Any]]:
    """Learn a tokenizer over the silos and measure it on their held-out text, beside one of the pooled text."""
    scratch, shards = recipe.scratch, open_shards(recipe, keep)
    assert scratch is not None
    key = str(recipe.task.get("text", "text"))
    texts = {name: texts_of(name, shard, key) for name, shard in shards.items()}
    names, traffic = list(texts), Traffic()
    algorithm = byte_pairs(
        everyone(names),
        vocab=scratch.vocab,
        min_silos=min(scratch.min_silos, len(names)),
        contribution=scratch.contribution,
        noise=scratch.noise,
    )

    def opened(name: str) -> Silo:
        return Silo(name, None, texts[name], {}, derive(recipe.seed, "silo", name))  # type: ignore[arg-type]

    exchange = metered(local(algorithm.client, opened, {}), traffic)
    state, reports = learn(algorithm, exchange)
    merges = state.params["merges"]
    tokenizer = make_tokenizer(merges.tolist())
    told: dict[str, Any] = {
        "vocab": len(tokenizer),
        "rounds": len(reports),
        "bytes_up": traffic.up,
        "bytes_down": traffic.down,
        "tokens_per_byte": density(tokenizer, texts),
    }
    if scratch.noise:
        told["looks"] = {name: len(reports) for name in names}
        told["epsilon"] = epsilon([Mechanism(scratch.noise, times=len(reports))], recipe.privacy.delta)
    if recipe.evaluate.pooled:
        pooled = pooled_tokenizer((text for parts in texts.values() for text in parts["train"]), len(tokenizer))
        told["pooled_tokens_per_byte"] = density(pooled, texts)
    return tokenizer, told


def texts_of(name: str, shard: Shard, key: str) -> dict[str, Sequence[str]]:
    """Return a silo's texts by split, read when asked for."""
    for row in chain(shard.train, shard.test):
        if key not in row:
            raise FedllmError(f"silos.{name} has a row without '{key}'; name the column with task.text.")
    return {"train": Mapped(shard.train, said(key)), "test": Mapped(shard.test, said(key))}


def said(key: str) -> Callable[[Row], str]:
    """Return what reads a row's text."""
    return lambda row: str(row[key])


def density(tokenizer: Any, texts: Mapping[str, Mapping[str, Sequence[str]]]) -> float:
    """Return tokens per byte over all held-out text."""
    tokens = size = 0
    for text in (text for parts in texts.values() for text in parts["test"]):
        tokens += len(tokenizer(text, add_special_tokens=False)["input_ids"])
        size += len(text.encode())
    return float(tokens / max(1, size))
