"""What a recipe can name: one literal dict from kind and name to function.

A recipe's keys are the keyword arguments of the functions here; there is no other schema.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping
from typing import Any

from pydantic import ConfigDict, TypeAdapter, ValidationError

from fedllm.algorithms import (
    black_box,
    chains,
    exemplars,
    fedbpt,
    scored_layers,
    self_consistency,
    templates,
    text_prompt,
)
from fedllm.core import aggregate, optimisers
from fedllm.core.errors import FedllmError, nearest
from fedllm.core.round import averaging, everything
from fedllm.exchange import (
    adaptive_dp,
    banded_dp,
    cast,
    central_dp,
    clip,
    dct,
    deltas,
    distributed_dp,
    fragments,
    local_dp,
    median,
    product,
    quantise,
    random_k,
    select,
    top_k,
    trimmed_mean,
)
from fedllm.silo import cleaning, dedupe, dp_sgd, ffa, partition, pii, prompts, quality, tasks, trainables, training

CATALOG: dict[str, dict[str, Callable[..., Any]]] = {
    "algorithm": {
        "averaging": averaging,
        "black_box": black_box.black_box,
        "exemplars": exemplars.exemplars,
        "fed_dp_cot": chains.fed_dp_cot,
        "fed_sp_sc": self_consistency.fed_sp_sc,
        "fedbpt": fedbpt.fedbpt,
        "templates": templates.templates,
        "text_prompt": text_prompt.text_prompt,
    },
    "task": {"instruct": tasks.instruct, "causal": tasks.causal, "classify": tasks.classify},
    "trainable": {
        "none": trainables.none,
        "full": trainables.full,
        "lora": trainables.lora,
        "ffa_lora": ffa.ffa_lora,
        "dora": trainables.dora,
        "ia3": trainables.ia3,
        "prefix": prompts.prefix,
        "prompt": prompts.prompt,
        "p_tuning": prompts.p_tuning,
        "peft": trainables.peft_method,
    },
    "client": {"local_training": training.local_training, "dp_sgd": dp_sgd.dp_sgd},
    "select": {
        "everyone": select.everyone,
        "fixed_size": select.fixed_size,
        "poisson": select.poisson,
        "cyclic": select.cyclic,
    },
    "share": {
        "everything": everything,
        "fragments": fragments.fragments,
        "deltas": deltas.deltas,
        "scored_layers": scored_layers.scored_layers,
        "product": product.product,
    },
    "aggregate": {"mean": aggregate.mean, "median": median.median, "trimmed_mean": trimmed_mean.trimmed_mean},
    "optimiser": {
        "fedavg": optimisers.fedavg,
        "fedavgm": optimisers.fedavgm,
        "nesterov": optimisers.nesterov,
        "fedadagrad": optimisers.fedadagrad,
        "fedadam": optimisers.fedadam,
        "fedyogi": optimisers.fedyogi,
    },
    "transforms": {
        "clip": clip.clip,
        "cast": cast.cast,
        "top_k": top_k.top_k,
        "random_k": random_k.random_k,
        "quantise": quantise.quantise,
        "dct": dct.dct,
        "central_dp": central_dp.central_dp,
        "adaptive_dp": adaptive_dp.adaptive_dp,
        "banded_dp": banded_dp.banded_dp,
        "local_dp": local_dp.local_dp,
        "distributed_dp": distributed_dp.distributed_dp,
    },
    "cleaning": {
        "utf8": cleaning.utf8,
        "exact_duplicates": dedupe.exact_duplicates,
        "near_duplicates": dedupe.near_duplicates,
        "quality": quality.quality,
        "repetition": quality.repetition,
        "pii": pii.pii,
    },
    "partition": {
        "by_column": partition.by_column,
        "by_label": partition.by_label,
        "iid": partition.iid,
        "dirichlet": partition.dirichlet,
        "quantity": partition.quantity,
    },
}

SEND_PROMPTS = (
    chains.fed_dp_cot,
    exemplars.exemplars,
    self_consistency.fed_sp_sc,
    templates.templates,
    text_prompt.text_prompt,
)
"""Algorithms that ask a model and learn nothing inside it."""

SERVER_FILES = ("pool", "public")
"""Settings of algorithms that name a file which only the server reads."""


def make(kind: str, part: Mapping[str, Any], *bound: Any, **offered: Any) -> Any:
    """Call the function that a recipe's table names, its first arguments `bound` by us.

    `offered` are arguments that are used where the function takes them and the recipe is silent
    (the seed). Raises `FedllmError` for an unknown name or key, with the nearest known one, and
    for a value of the wrong type.
    """
    keys = dict(part)
    name = keys.pop("name", None)
    if name is None:
        raise FedllmError(f"{kind} has no 'name'; say which: {', '.join(sorted(CATALOG[kind]))}.")
    if name not in CATALOG[kind]:
        raise FedllmError(f"{kind}.name '{name}' is unknown; {nearest(str(name), CATALOG[kind])}")
    function = CATALOG[kind][name]
    known = schema(function, len(bound))
    anything = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values())
    for key, value in keys.items():
        if key in known:
            keys[key] = checked(f"{kind}.{key}", value, known[key])
        elif not anything:
            raise FedllmError(f"{kind}.{key} is not a setting of '{name}'; {nearest(key, known)}")
    given = {**{key: value for key, value in offered.items() if key in known}, **keys}
    for key, parameter in inspect.signature(function).parameters.items():
        if key in known and key not in given and parameter.default is parameter.empty:
            raise FedllmError(f"{kind}.{key} is missing; '{name}' needs it.")
    return function(*bound, **given)


def schema(function: Callable[..., Any], bound: int) -> dict[str, Any]:
    """Return the types of a function's settings: its parameters without the first `bound` ones."""
    hints = typing.get_type_hints(function)
    names = [
        name
        for name, parameter in list(inspect.signature(function).parameters.items())[bound:]
        if parameter.kind is not parameter.VAR_KEYWORD
    ]
    return {name: hints.get(name, Any) for name in names}


def checked(where: str, value: Any, hint: Any) -> Any:
    """Return the value as the type that is asked for, or say what is wrong with it."""
    try:
        return TypeAdapter(hint, config=ConfigDict(arbitrary_types_allowed=True)).validate_python(value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise FedllmError(f"{where} is {value!r}; {reason[0].lower()}{reason[1:]}.") from error
