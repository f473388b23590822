"""P-tuning's encoder at the silo: local training goes through it, and only the prompt that it makes is sent."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from fedllm.core.seeds import derive
from fedllm.core.tensors import below, subtract, under
from fedllm.core.types import Reply, Request, Silo, Tensors, Work
from fedllm.silo.fit import seeded
from fedllm.silo.trainables import parameters, trained, write


class EncodedPrompt(nn.Module):
    """A prompt that begins at `start_PD` and moves as its encoder does; where `peft` looks for its prompt encoder."""

    def __init__(self, encoder: nn.Module, start_PD: Tensor) -> None:
        super().__init__()
        self.encoder = encoder
        self.places = torch.arange(len(start_PD), device=start_PD.device)
        with torch.no_grad():
            self.offset_PD = start_PD - self.encoder(self.places[None])[0]

    @property
    def embedding(self) -> SimpleNamespace:
        """What `peft` asks for the device."""
        return SimpleNamespace(weight=self.offset_PD)

    def whole(self) -> Tensor:
        """Return the prompt as it is now, [P, D]."""
        made: Tensor = self.offset_PD + self.encoder(self.places[None])[0]
        return made

    def forward(self, places_BP: Tensor) -> Tensor:
        """Return the embeddings of the virtual tokens as [B, P, D]."""
        return self.whole()[places_BP]


def through_encoder(work: Work, hidden: int, kind: str) -> Work:
    """Let the client train its prompt through an encoder of its own, one by one; the cohort has no such clients."""

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        ((name, start_PD),) = request.tensors.items()
        inner = silo._replace(memory=below("inner", silo.memory))
        with encoded(silo, start_PD, hidden, kind, below("encoder", silo.memory)) as module:
            own = parameters(silo.model)
            reply, kept = work.client(request._replace(tensors=own), inner)
            ended = subtract(own, reply.tensors)
            write(trained(silo.model), ended)
            with torch.no_grad():
                update_PD = start_PD - module.whole().to(start_PD.device)
        if not all(bool(value.isfinite().all()) for value in ended.values()):
            ended, kept = {}, {}
        return reply._replace(tensors={name: update_PD}), {**under("encoder", ended), **under("inner", kept)}

    return work._replace(client=client, cohort=None)


@contextmanager
def encoded(silo: Silo, start_PD: Tensor, hidden: int, kind: str, known: Tensors) -> Iterator[EncodedPrompt]:
    """Put the silo's encoder, as it is `known` or else a fresh one, in the place of the model's prompt."""
    from peft import PromptEncoder, PromptEncoderConfig

    model: Any = silo.model
    plain = model.prompt_encoder["default"]
    count, width = start_PD.shape
    config = PromptEncoderConfig(
        num_virtual_tokens=count,
        token_dim=width,
        num_transformer_submodules=1,
        encoder_hidden_size=hidden,
        encoder_reparameterization_type=kind,
    )
    device = plain.embedding.weight.device
    with seeded(derive(silo.seed, "encoder"), device):
        encoder = PromptEncoder(config).to(device)
    if known:
        write(dict(encoder.named_parameters(prefix="prompt_encoder.default.encoder")), known)
    module = EncodedPrompt(encoder, start_PD.to(device))
    try:
        model.prompt_encoder["default"] = module
        yield module
    finally:
        model.prompt_encoder["default"] = plain
