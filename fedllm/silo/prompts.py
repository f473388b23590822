"""Soft prompts: learned tokens that stand before the text, through `peft`.

Averaged by examples they are FedPrompt (Zhao et al. 2022, arXiv:2208.12268): the model is frozen, and only the prompt
travels and is averaged, each silo's by its number of examples.
"""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.silo.encoder import through_encoder
from fedllm.silo.trainables import Trainable, peft_method

Start: TypeAlias = Literal["vocabulary", "text", "random"]

Tokenizer: TypeAlias = Callable[..., Any] | None

TOKENS = 16
"""Virtual tokens where the recipe says nothing."""

COMMON = 5000
"""Of so many tokens, the first and so the commonest, a start is drawn (Lester et al. 2021, section 3.2)."""


class PersonalPrompt(nn.Module):
    """A prompt whose last tokens are a silo's own; where `peft` looks for its prompt encoder."""

    def __init__(self, shared_PD: Tensor, personal_PD: Tensor) -> None:
        super().__init__()
        self.shared, self.personal = nn.Parameter(shared_PD), nn.Parameter(personal_PD)

    @property
    def embedding(self) -> SimpleNamespace:
        """What `peft` asks for the device."""
        return SimpleNamespace(weight=self.shared)

    def forward(self, places_BP: Tensor) -> Tensor:
        """Return the embeddings of the virtual tokens as [B, P, D]."""
        whole: Tensor = torch.cat([self.shared, self.personal])[places_BP]
        return whole


class LayeredPrefix(nn.Module):
    """A prefix as one tensor a layer, [P, keys and values], so that layers can travel by themselves."""

    def __init__(self, flat_PF: Tensor, layers: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Embedding.from_pretrained(part.clone(), freeze=False) for part in flat_PF.chunk(layers, 1)
        )

    @property
    def embedding(self) -> Any:
        """What `peft` asks for the device."""
        return self.layers[0]

    def forward(self, places_BP: Tensor) -> Tensor:
        """Return all layers' keys and values of the virtual tokens as [B, P, F]."""
        return torch.cat([layer(places_BP) for layer in self.layers], -1)


def prompt(
    tokens: int | None = None,
    init: Start = "vocabulary",
    text: str = "",
    personal: int = 0,
    tokenizer: Tokenizer = None,
) -> Trainable:
    """Prompt tuning (Lester et al. 2021, arXiv:2104.08691): learned embeddings before the text's own.

    They begin as those of common tokens of the `vocabulary`, of a `text` (repeated until there are `tokens`; by
    default as many as it has), or `random` between -0.5 and 0.5. After them may stand `personal` ones, which are
    trained in the same steps and never leave the silo: pFedPrompt's idea (Guo et al. 2023) of a consensus beside a
    silo's own features, which there are visual and attended to, and here are a part of the prompt.
    """
    require_start(tokens, init, text)
    if personal < 0:
        raise FedllmError(f"trainable.personal is {personal}; it must be 0 or more.")
    ids_of, count = start_tokens(tokens, init, text, tokenizer)
    plain = peft_method("PROMPT_TUNING", num_virtual_tokens=count + personal)

    def attach(model: nn.Module, seed: int) -> nn.Module:
        require_room(model, count + personal)
        attached: Any = plain.attach(model, seed)
        table_VD = model.get_input_embeddings().weight  # type: ignore[operator]
        own = drawn(table_VD.shape[0], personal, seed, "personal")
        with torch.no_grad():
            start_PD = noise(count, table_VD, seed) if init == "random" else rows(table_VD, ids_of(seed, table_VD))
            whole_PD = torch.cat([start_PD, rows(table_VD, own)])
            if personal:
                attached.prompt_encoder["default"] = PersonalPrompt(whole_PD[:count], whole_PD[count:])
            else:
                attached.prompt_encoder["default"].embedding.weight.copy_(whole_PD)
        return attached

    return plain._replace(name="prompt", attach=attach, stays=lambda name: name.endswith("default.personal"))


def p_tuning(
    tokens: int | None = None,
    hidden: int = 128,
    encoder: Literal["silo", "shared"] = "silo",
    kind: Literal["MLP", "LSTM"] = "MLP",
    init: Start = "vocabulary",
    text: str = "",
    tokenizer: Tokenizer = None,
) -> Trainable:
    """P-tuning (Liu et al. 2021, arXiv:2103.10385): a prompt made by a small encoder, through which it is trained.

    With the encoder at the `silo` only the embeddings that it makes, the prompt, are sent and averaged; its weights
    stay in the silo's memory. A round begins at the prompt as it came, e(x) = sent + encoder(x) - encoder_0(x): a mean
    of prompts means something, a mean of encoders that drew apart does not, and it costs a fraction of the bytes. What
    is exported is a plain prompt, since the paper drops its encoder after training too. With a `shared` one its
    weights are averaged as `peft` keeps them, and the start is its own.
    """
    if encoder == "silo":
        made = prompt(tokens, init, text, tokenizer=tokenizer)
        return made._replace(name="p_tuning", work=lambda work: through_encoder(work, hidden, kind))
    if text or init != "vocabulary":
        raise FedllmError("trainable.encoder is 'shared', whose start is its own; leave out trainable.init and text.")
    require_start(tokens, init, text)
    plain = peft_method(
        "P_TUNING",
        num_virtual_tokens=tokens or TOKENS,
        encoder_hidden_size=hidden,
        encoder_reparameterization_type=kind,
    )
    return roomy(plain, tokens or TOKENS)


def prefix(
    tokens: int | None = None, init: Start = "vocabulary", text: str = "", tokenizer: Tokenizer = None
) -> Trainable:
    """Prefix tuning (Li and Liang 2021, arXiv:2101.00190): learned keys and values before every layer's own.

    They begin as what the model itself makes of common tokens or of a `text` (their section 7.4), then the model
    answers at first as if that text stood there, or `random`. Each layer's are a tensor of their own. Unlike there
    they are trained as they are, without the MLP.
    """
    require_start(tokens, init, text)
    ids_of, count = start_tokens(tokens, init, text, tokenizer)
    plain = peft_method("PREFIX_TUNING", num_virtual_tokens=count)

    def attach(model: nn.Module, seed: int) -> nn.Module:
        require_room(model, count)
        table_VD = model.get_input_embeddings().weight  # type: ignore[operator]
        known = init != "random" and table_VD.device.type != "meta"
        start_PF = keys_and_values(model, ids_of(seed, table_VD)) if known else None
        attached: Any = plain.attach(model, seed)
        encoder, layers = attached.prompt_encoder["default"], attached.active_peft_config.num_layers
        flat_PF = encoder.embedding.weight.detach()
        if start_PF is not None:
            if start_PF.shape != flat_PF.shape:
                raise FedllmError(
                    f"The keys and values of {type(model).__name__} are not laid out as peft's prefix expects; use "
                    "trainable.init = 'random' or trainable.name = 'prompt'."
                )
            flat_PF = start_PF
        attached.prompt_encoder["default"] = LayeredPrefix(flat_PF, layers)
        return attached

    return plain._replace(name="prefix", attach=attach)


def require_start(tokens: int | None, init: Start, text: str) -> None:
    """Refuse a start that says too little or contradicts itself."""
    if tokens is not None and tokens < 1:
        raise FedllmError(f"trainable.tokens is {tokens}; it must be 1 or more.")
    if (init == "text") != bool(text):
        missing = "trainable.init is 'text' but trainable.text is missing; write the text."
        raise FedllmError(missing if not text else f"trainable.text is set but init is '{init}'; set init = 'text'.")


def start_tokens(
    tokens: int | None, init: Start, text: str, tokenizer: Tokenizer
) -> tuple[Callable[[int, Tensor], list[int]], int]:
    """Return what gives the start's token ids (from the seed and the table of embeddings), and how many they are."""
    if init != "text":
        count = tokens or TOKENS
        return lambda seed, table_VD: drawn(table_VD.shape[0], count, seed, "shared"), count
    if tokenizer is None:
        raise FedllmError("trainable.init is 'text', which needs the model's tokenizer; give it to the function too.")
    ids = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    count = tokens or len(ids)
    if len(ids) > count:
        raise FedllmError(f"trainable.text has {len(ids)} tokens but trainable.tokens is {count}; raise or drop that.")
    repeated = (ids * -(-count // len(ids)))[:count]
    return lambda seed, table_VD: repeated, count


def drawn(vocabulary: int, count: int, seed: int, what: str) -> list[int]:
    """Draw common tokens at random."""
    return torch.randint(min(COMMON, vocabulary), (count,), generator=generator(seed, "prompt", what)).tolist()


def rows(table_VD: Tensor, ids: list[int]) -> Tensor:
    """Return the embeddings of tokens, in float32."""
    return table_VD[torch.tensor(ids, dtype=torch.long, device=table_VD.device)].float()


def noise(count: int, table_VD: Tensor, seed: int) -> Tensor:
    """Return random embeddings, where the table's are."""
    draw = torch.rand(count, table_VD.shape[1], generator=generator(seed, "prompt", "random")) - 0.5
    return draw.to(table_VD.device)


@torch.no_grad()
def keys_and_values(model: nn.Module, ids: list[int]) -> Tensor:
    """Return what the model remembers of tokens as [P, layers x (keys, values)], in float32."""
    cache = model(input_ids=torch.tensor([ids], device=next(model.parameters()).device), use_cache=True).past_key_values
    each = [part[0].transpose(0, 1).flatten(1) for layer in cache.layers for part in (layer.keys, layer.values)]
    return torch.cat(each, 1).float()


def roomy(trainable: Trainable, tokens: int) -> Trainable:
    """Let a trainable refuse a model that its virtual tokens do not fit into."""

    def attach(model: nn.Module, seed: int) -> nn.Module:
        require_room(model, tokens)
        return trainable.attach(model, seed)

    return trainable._replace(attach=attach)


def require_room(model: Any, tokens: int, text: int = 1) -> None:
    """Refuse a prompt that leaves no room for `text` tokens in the model's context."""
    context = getattr(model.config, "max_position_embeddings", None)
    if context is not None and tokens + text > context:
        beside = f"and the longest text {text} " if text > 1 else ""
        raise FedllmError(
            f"The prompt has {tokens} tokens {beside}but the model's context is {context}; lower trainable.tokens"
            f"{' or task.max_tokens' if beside else ''}."
        )


def virtual_tokens(model: nn.Module) -> int:
    """Return how many learned tokens stand before the text."""
    config = getattr(model, "active_peft_config", None)
    return int(config.num_virtual_tokens) if config is not None and config.is_prompt_learning else 0
