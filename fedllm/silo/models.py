"""A model and its tokenizer by Hugging Face id, local folder, or one of the names that need no hub."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from fedllm.core.errors import FedllmError

SMOLLM2 = "smollm2-135m-instruct"

ENDPOINT = "endpoint"
"""What a recipe writes as its `model` where the model is behind an API."""


def model_folder(name: str) -> str:
    """Return the folder of a model that fedllm brings along, else the name itself."""
    if name == SMOLLM2:
        from fedllm.silo.smollm2 import smollm2_folder

        return str(smollm2_folder())
    return name


def weights_sha256(name: str) -> str:
    """Return one hash over a model's weight files: what two machines compare to know that they have the same base."""
    if name == ENDPOINT:
        return hashlib.sha256(b"behind an API").hexdigest()
    folder = Path(model_folder(name))
    if not folder.is_dir():
        import huggingface_hub

        folder = Path(huggingface_hub.snapshot_download(name, allow_patterns=["*.safetensors", "*.json"]))
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FedllmError(f"The model '{name}' has no safetensors weights in '{folder}'; convert it, then try again.")
    each = [hashlib.file_digest(file.open("rb"), "sha256").hexdigest() for file in files]
    return each[0] if len(each) == 1 else hashlib.sha256("".join(each).encode()).hexdigest()


def load_tokenizer(name: str) -> Any:
    """Load a tokenizer; one without a padding token pads with its end token."""
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(model_folder(name))
    except (OSError, ValueError) as error:
        raise FedllmError(no_model(name, error)) from error
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


SHORT = 192
"""Tokens in a row up to which plain matmuls beat the CPU's flash attention in bfloat16 (1.2x at 96 tokens)."""


CPU = torch.device("cpu")


def load_model(
    name: str,
    device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
    longest: int = 512,
    checkpointing: bool = False,
) -> nn.Module:
    """Load a causal language model, frozen, for rows of up to `longest` tokens."""
    from transformers import AutoModelForCausalLM

    plain = device.type == "cpu" and dtype == torch.bfloat16 and longest <= SHORT
    try:
        model: Any = AutoModelForCausalLM.from_pretrained(
            model_folder(name), dtype=dtype, attn_implementation="eager" if plain else None
        )
    except (OSError, ValueError) as error:
        raise FedllmError(no_model(name, error)) from error
    model.requires_grad_(False)
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    return model.to(device).eval()


def empty_model(name: str, dtype: torch.dtype) -> nn.Module:
    """Return the model's shapes without its weights, on the meta device."""
    from transformers import AutoConfig, AutoModelForCausalLM

    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder(name)), dtype=dtype)
    except (OSError, ValueError) as error:
        raise FedllmError(no_model(name, error)) from error
    return model.requires_grad_(False).eval()


def no_model(name: str, error: Exception) -> str:
    """Say that a model could not be loaded and what to give instead."""
    if Path(name).is_dir():
        reason = str(error).split("\n")[0].rstrip(".")
        return f"The folder '{name}' is not a transformers model ({reason}); it needs config.json and weights."
    return (
        f"There is no model '{name}': not a local folder, and not to be had from the Hugging Face hub; give a folder, "
        f"an id that you can reach, or '{SMOLLM2}'."
    )


def pick_device(name: str) -> torch.device:
    """Return the device to compute on; `auto` takes CUDA, then MPS, then the CPU."""
    if name != "auto":
        try:
            device = torch.device(name)
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:
            raise FedllmError(f"device is '{name}', which this machine does not have; use 'auto' or 'cpu'.") from error
        return device
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(name: str, device: torch.device) -> torch.dtype:
    """Return the type to compute in; `auto` is bfloat16 where the device multiplies it fast, else float32."""
    known = {"float32": torch.float32, "bfloat16": torch.bfloat16}
    if name in known:
        return known[name]
    if name != "auto":
        raise FedllmError(f"dtype is '{name}'; use 'auto', 'float32' or 'bfloat16'.")
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    return torch.bfloat16 if device.type == "cpu" and cpu_multiplies_bf16() else torch.float32


def cpu_multiplies_bf16() -> bool:
    """Say whether the processor has bfloat16 instructions that torch uses."""
    checks = (getattr(torch.cpu, f"_is_{kind}_supported", None) for kind in ("avx512_bf16", "amx_tile"))
    return any(check is not None and check() for check in checks)
