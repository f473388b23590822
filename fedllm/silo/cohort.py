"""Many clients' adapters or soft prompts inside one frozen base, so that a round trains as one batch.

Every shared matmul is then one large matmul, and only the low-rank part is a batched one; of prompts each row of the
batch gets its own client's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from fedllm.core.types import Cohort, Reply, Request, Silo, Tensors
from fedllm.silo.fit import Settings, step_count, steps_taken
from fedllm.silo.inner import steps_made
from fedllm.silo.trainables import trained

if TYPE_CHECKING:
    from peft.tuners.lora import Linear as LoraLinear

PROMPT = "prompt_encoder.default."
"""Where `peft` keeps what makes a soft prompt."""


class StackedLora(nn.Module):
    """A frozen linear layer with C clients' low-rank parts, each for its own rows; rows are grouped by client.

    A may be one for all of them.
    """

    def __init__(self, base: nn.Module, a_CRI: Tensor, b_COR: Tensor, scaling: float) -> None:
        super().__init__()
        self.base, self.scaling = base, scaling
        self.a_CRI, self.b_COR = nn.Parameter(a_CRI), nn.Parameter(b_COR)

    def forward(self, x_BTI: Tensor) -> Tensor:
        """Map [C * b, T, I] to [C * b, T, O]."""
        y_BTO = self.base(x_BTI)
        clients, outputs, _ = self.b_COR.shape
        own, inputs = self.b_COR.dtype, x_BTI.shape[-1]
        low = torch.bmm(x_BTI.reshape(clients, -1, inputs).to(own), self.a_CRI.expand(clients, -1, -1).mT)
        grouped = y_BTO.reshape(clients, -1, outputs).to(own)
        return torch.baddbmm(grouped, low, self.b_COR.mT, alpha=self.scaling).to(y_BTO.dtype).view(y_BTO.shape)


class StackedPrompt(nn.Module):
    """A prompt encoder with C clients' parameters, each for its own rows; rows are grouped by client."""

    def __init__(self, encoder: nn.Module, values: Tensors, places_P: Tensor) -> None:
        super().__init__()
        self.places_P = places_P
        # A list, since a prompt encoder's parameters are not to be found as this module's own.
        self.encoder = [encoder]
        self.names = list(values)
        self.values = nn.ParameterList(nn.Parameter(value.clone()) for value in values.values())

    @property
    def embedding(self) -> SimpleNamespace:
        """What `peft` asks for the device."""
        return SimpleNamespace(weight=self.values[0])

    def forward(self, places_BP: Tensor) -> Tensor:
        """Return the virtual tokens of each row, [C * b, P, ...]."""
        rows = places_BP.shape[0] // len(self.values[0])
        each = [
            functional_call(self.encoder[0], dict(zip(self.names, own, strict=True)), (places_BP[:1],))
            for own in zip(*self.values, strict=True)
        ]
        return torch.cat(each).repeat_interleave(rows, 0)

    def for_rows(self, batch_size: int, **_: Any) -> Tensor:
        """Return the virtual tokens of so many rows, as `peft` asks for them."""
        return self(self.places_P.expand(batch_size, -1))


def lora_layers(model: nn.Module) -> dict[str, LoraLinear]:
    """Return the model's LoRA layers by name."""
    # Here, since peft takes seconds to load, and a site's daemon has no model.
    from peft.tuners.lora import Linear as LoraLinear

    return {name: module for name, module in model.named_modules() if isinstance(module, LoraLinear)}


def prompt_encoder(model: nn.Module) -> nn.Module | None:
    """Return the model's prompt encoder if all that is trained is in it and each row's prompt is only its own."""
    kind = getattr(getattr(model, "active_peft_config", None), "peft_type", None)
    if kind not in ("PROMPT_TUNING", "PREFIX_TUNING", "P_TUNING"):
        return None
    encoder = model.get_submodule(PROMPT.removesuffix("."))
    draws = any(getattr(module, "p", getattr(module, "dropout", 0)) for module in encoder.modules())
    inside = {f"{PROMPT}{name}" for name, _ in encoder.named_parameters()}
    return None if draws or trained(model).keys() != inside else encoder


def stackable(model: nn.Module) -> bool:
    """Say whether all that the model trains is plain LoRA on linear layers or a soft prompt, without dropout.

    DoRA's magnitudes depend on the dense product of each client, and dropout draws from one generator.
    """
    if prompt_encoder(model) is not None:
        return True
    layers = lora_layers(model)
    plain = all(
        not any(layer.use_dora.values()) and all(isinstance(d, nn.Identity) for d in layer.lora_dropout.values())
        for layer in layers.values()
    )
    halves = {f"{name}.lora_{half}.default.weight" for name in layers for half in "AB"}
    return bool(layers) and plain and trained(model).keys() in (halves, {name for name in halves if ".lora_B." in name})


@contextmanager
def stacked(model: nn.Module, values: Tensors) -> Iterator[Mapping[str, nn.Parameter]]:
    """Put stacked adapters or prompts `values` (name -> [C, ...]) into a stackable model; yield them as parameters."""
    if (encoder := prompt_encoder(model)) is not None:
        place = PROMPT.removesuffix(".")
        many: Any = model
        own = {name.removeprefix(PROMPT): value for name, value in values.items()}
        prompts = StackedPrompt(encoder, own, many.prompt_tokens["default"].to(next(encoder.parameters()).device))
        try:
            model.set_submodule(place, prompts)
            if many.active_peft_config.peft_type != "PREFIX_TUNING":
                # Of prompts peft makes one and repeats it for every row.
                many.get_prompt = prompts.for_rows
            yield dict(zip(values, prompts.values, strict=True))
        finally:
            model.set_submodule(place, encoder)
            many.__dict__.pop("get_prompt", None)
        return
    layers = lora_layers(model)
    params: dict[str, nn.Parameter] = {}
    try:
        for name, layer in layers.items():
            a, b = (f"{name}.lora_{half}.default.weight" for half in "AB")
            a_CRI = values[a].clone() if a in values else layer.get_parameter("lora_A.default.weight").detach()[None]
            many = StackedLora(layer.base_layer, a_CRI, values[b].clone(), layer.scaling["default"])
            params |= {name: value for name, value in ((a, many.a_CRI), (b, many.b_COR)) if name in values}
            many.a_CRI.requires_grad_(a in values)
            model.set_submodule(name, many)
        yield params
    finally:
        for name, layer in layers.items():
            model.set_submodule(name, layer)


def stack(tensors: Sequence[Tensors], device: torch.device) -> dict[str, Tensor]:
    """Stack the members' tensors along a new first dimension C."""
    return {name: torch.stack([each[name].to(device) for each in tensors]) for name in tensors[0]}


def by_equal_steps(cohort: Cohort, settings: Settings) -> Cohort:
    """Train those members of a cohort together that take the same number of steps, and took as many before."""

    def grouped(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        groups: dict[tuple[float, ...], list[int]] = {}
        for place, (request, silo) in enumerate(members):
            before = steps_made(silo.memory) if settings.inner.keep else ()
            groups.setdefault(
                (steps_taken(settings, request, silo.data), step_count(settings, silo.data), request.round, *before), []
            ).append(place)
        answers = {
            place: each
            for places in groups.values()
            for place, each in zip(places, cohort([members[place] for place in places]), strict=True)
        }
        return [answers[place] for place in range(len(members))]

    return grouped
