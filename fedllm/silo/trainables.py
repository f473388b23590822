"""What is learned: all weights, or a small part through `peft`. The result is an ordinary folder."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.core.errors import FedllmError, nearest
from fedllm.core.room import room_for
from fedllm.core.seeds import derive
from fedllm.core.types import Tensors, Work
from fedllm.silo.sharded import spread

ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

DECLINED = (ValueError, NotImplementedError)
"""What peft raises where a method has no place in a model; it has no error of its own."""

OWN_TARGETS = {"ADAPTION_PROMPT", "BEFT", "IA3", "LN_TUNING", "SHADOW", "TRAINABLE_TOKENS"}
"""Methods of peft that by default train something else than linear layers, which peft itself knows to find."""

NOT_AVERAGED = {
    "ADALORA": "each silo would prune other ranks, by its own gradients",
    "XLORA": "it mixes adapters that exist already",
    "POLY": "it is steered by task ids, which text does not have",
    "MULTITASK_PROMPT_TUNING": "it is steered by task ids, which text does not have",
}
"""Methods of peft whose parameters have no meaningful mean, or that cannot train on text alone, and why."""


class Trainable(NamedTuple):
    """What is learned.

    `attach(model, seed)` returns the model in which exactly the trained parameters require a
    gradient. `base(model)` is a context in which the model answers as before training, for the
    parameters it had then. `merge(model)` returns the plain model with what was learned inside.
    `stays(name)` says which of the trained parameters never leave a silo. `work` may change how a client trains.
    """

    name: str
    attach: Callable[[nn.Module, int], nn.Module]
    base: Callable[[nn.Module], AbstractContextManager[Any]]
    merge: Callable[[nn.Module], nn.Module]
    adapter: bool
    stays: Callable[[str], bool] = lambda name: False
    work: Callable[[Work], Work] = lambda work: work


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that are learned, by name."""
    return {name: value for name, value in model.named_parameters() if value.requires_grad}


def parameters(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of the values that are learned, by name."""
    return {name: room_for(value).copy_(value.detach()) for name, value in trained(model).items()}


def write(params: dict[str, nn.Parameter], tensors: Tensors) -> None:
    """Copy tensors into the trained parameters, which must be exactly those."""
    if params.keys() != tensors.keys():
        odd = sorted(params.keys() ^ tensors.keys())[0]
        raise FedllmError(
            f"The model does not train what was sent (first odd name: '{odd}'); use the run's own recipe."
        )
    with torch.no_grad():
        for name, value in tensors.items():
            params[name].copy_(spread(value, params[name]))


def none() -> Trainable:
    """Learn nothing in the model: for algorithms whose result is a text."""

    def attach(model: nn.Module, seed: int) -> nn.Module:
        return model.requires_grad_(False)

    return Trainable("none", attach, lambda model: nullcontext(), lambda model: model, adapter=True)


def full() -> Trainable:
    """Train all weights, kept in float32 whatever type they are computed in."""

    def attach(model: nn.Module, seed: int) -> nn.Module:
        return model.float().requires_grad_(True)

    return Trainable("full", attach, lambda model: nullcontext(), lambda model: model, adapter=False)


def lora(
    r: int = 8,
    alpha: float = 16,
    dropout: float = 0.0,
    target_modules: Sequence[str] | str | None = None,
    rslora: bool = False,
) -> Trainable:
    """LoRA (Hu et al. 2021, arXiv:2106.09685): W + alpha / r * B A; by default on the attention projections."""
    return peft_method(
        "LORA", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, use_rslora=rslora
    )


def dora(
    r: int = 8, alpha: float = 16, dropout: float = 0.0, target_modules: Sequence[str] | str | None = None
) -> Trainable:
    """DoRA (Liu et al. 2024, arXiv:2402.09353): LoRA on the direction of W, and its magnitude learned apart."""
    return peft_method(
        "LORA", r=r, lora_alpha=alpha, lora_dropout=dropout, target_modules=target_modules, use_dora=True
    )


def ia3(target_modules: Sequence[str] | None = None, feedforward_modules: Sequence[str] | None = None) -> Trainable:
    """IA3 (Liu et al. 2022, arXiv:2205.05638): learned scales of keys, values and feed-forward activations."""
    return peft_method("IA3", target_modules=target_modules, feedforward_modules=feedforward_modules)


def peft_method(method: str, **config: Any) -> Trainable:
    """Any method of `peft` whose parameters can be averaged; `config` is that of its config class."""
    from peft import PEFT_TYPE_TO_CONFIG_MAPPING

    kinds = {str(kind.value): cls for kind, cls in PEFT_TYPE_TO_CONFIG_MAPPING.items()}
    if method not in kinds:
        raise FedllmError(f"trainable.method '{method}' is not one of peft's; {nearest(method, kinds)}")
    if method in NOT_AVERAGED:
        raise FedllmError(f"trainable.method '{method}' cannot be averaged: {NOT_AVERAGED[method]}; use 'lora'.")
    known = kinds[method].__dataclass_fields__
    for key in config:
        if key not in known:
            raise FedllmError(f"trainable.{key} is not a setting of peft's {method}; {nearest(key, known)}")
    if "num_virtual_tokens" in known and method != "CPT" and "num_virtual_tokens" not in config:
        raise FedllmError(f"trainable.num_virtual_tokens is missing; say how many tokens peft's {method} learns.")
    tokens = config.get("num_virtual_tokens", 1)
    if type(tokens) is not int or tokens < 1:
        raise FedllmError(f"trainable.num_virtual_tokens is {tokens!r}; it must be a whole number, 1 or more.")
    if "task_type" in known:
        config.setdefault("task_type", "CAUSAL_LM")

    def attach(model: nn.Module, seed: int) -> nn.Module:
        from peft import get_peft_model

        aimed = "target_modules" in known and method not in OWN_TARGETS
        settings = configured(method, kinds[method], with_targets(config, model) if aimed else config)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(derive(seed, "attach"))
            try:
                return get_peft_model(model, settings)
            # A rank of 0, which most methods refuse, some divide by: a setting, whatever the layers.
            except (TypeError, ZeroDivisionError) as error:
                raise FedllmError(unsettled(method, error)) from error
            except DECLINED as error:
                raise FedllmError(misfit(method, model, error)) from error

    return Trainable(method.lower(), attach, without_adapter, lambda model: merge(method, model), adapter=True)


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """Let the model answer as its base does; what is trained stays so, and what is frozen too."""
    learned = trained(model).keys()
    try:
        with model.disable_adapter():
            yield
    finally:
        # peft makes all of an adapter trainable when it puts it back.
        for name, value in model.named_parameters():
            value.requires_grad_(name in learned)


def configured(method: str, kind: Callable[..., Any], settings: Mapping[str, Any]) -> Any:
    """Return a method's settings as peft takes them, or say in one sentence why it does not."""
    try:
        return kind(**settings)
    except ImportError as error:
        why = first_sentence(error)
        raise FedllmError(
            f"peft's {method} needs a package that is not installed ({why}); install it or use 'lora'."
        ) from error
    except (ValueError, TypeError) as error:
        raise FedllmError(unsettled(method, error)) from error


def unsettled(method: str, error: Exception) -> str:
    """Say in one sentence that a method's settings do not go together, or are of the wrong type."""
    return (
        f"peft's {method} cannot take the settings of trainable ({first_sentence(error)}); one is missing, 0, of "
        "the wrong type or does not go with another: see its config class in peft's documentation."
    )


def with_targets(config: dict[str, Any], model: nn.Module) -> dict[str, Any]:
    """Aim at the attention projections where the recipe names no target and the model has them."""
    target = config.get("target_modules")
    if target is None and set(ATTENTION) <= linear_suffixes(model):
        target = ATTENTION
    return {**config, "target_modules": list(target) if isinstance(target, tuple) else target}


def linear_suffixes(model: nn.Module) -> set[str]:
    """Return the last part of the names of the model's linear layers."""
    return {
        name.rpartition(".")[2]
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or type(module).__name__ == "Conv1D") and not name.endswith(".base_layer")
    }


def misfit(method: str, model: nn.Module, error: Exception) -> str:
    """Say in one sentence that a method, with these settings and at these layers, does not fit a model."""
    return (
        f"peft's {method} does not fit {type(model).__name__} ({first_sentence(error)}); change that setting under "
        f"[trainable], or aim trainable.target_modules at some of: {', '.join(sorted(linear_suffixes(model)))}."
    )


def merge(method: str, model: Any) -> nn.Module:
    """Fold an adapter into the weights, or say that it has no place there."""
    remedy = "use the run's adapter folder instead"
    if not hasattr(model, "merge_and_unload"):
        raise FedllmError(f"A {method} adapter has no weights to merge into; {remedy}.")
    # Only by trying does peft tell which methods, and which layers, have no place in the weights.
    try:
        return model.merge_and_unload()
    except DECLINED as error:
        why = first_sentence(error)
        raise FedllmError(f"A {method} adapter cannot be merged into the weights ({why}); {remedy}.") from error


def first_sentence(error: Exception) -> str:
    """Return the first sentence of what a library says."""
    return str(error).split(". ")[0].split("\n")[0].strip(". ")


def export(model: Any, folder: Path) -> None:
    """Write what was learned as an ordinary peft (or transformers) folder, in safetensors."""
    model.save_pretrained(folder, safe_serialization=True)
