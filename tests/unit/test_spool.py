"""Messages as files: the same bits in the same order, and nothing read that lies."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save

from fedllm.core.errors import Refused
from fedllm.runtime.spool import load_message, save_message
from fedllm.runtime.wire import CODES


def test_a_message_file_keeps_order_bits_and_alignment(tmp_path):
    tensors = {
        "z": torch.randn(3),
        "b": torch.tensor([True, False]),
        "a": torch.randn(2, 3).to(torch.bfloat16),
        "empty": torch.zeros(0, 4),
        "one": torch.tensor(7, dtype=torch.int8),
    }
    file = save_message(tmp_path / "m", tensors, {"client": "a"})
    back, head = load_message(file.path)
    assert list(back) == list(tensors) and head == {"client": "a"}
    assert all(back[name].dtype == value.dtype and torch.equal(back[name], value) for name, value in tensors.items())
    assert all(value.data_ptr() % 64 == 0 for value in back.values())
    assert save_message(tmp_path / "n", tensors, {"client": "a"}).key == file.key
    assert save_message(tmp_path / "n", dict(reversed(tensors.items())), {"client": "a"}).key != file.key


@pytest.mark.parametrize("dtype", list(CODES))
def test_a_message_that_another_program_wrote_is_read(tmp_path, dtype):
    tensors = {"x": torch.ones(3, dtype=dtype), "y": torch.zeros((), dtype=dtype)}
    (tmp_path / "m").write_bytes(save(tensors, {"fedllm": json.dumps({"client": "a"})}))
    back, head = load_message(tmp_path / "m")
    assert head == {"client": "a"} and back.keys() == tensors.keys()
    assert all(back[name].dtype == dtype and torch.equal(back[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize(
    "names", [5, ["x", "x"], ["x", "gone"], [["x"]], "x", None, {"x": 1}], ids=lambda names: repr(names)
)
def test_a_list_of_names_that_lies_loses_no_tensor(tmp_path, names):
    data = save({"x": torch.ones(2), "y": torch.ones(2)}, {"fedllm": json.dumps({"names": names})})
    (tmp_path / "m").write_bytes(data)
    try:
        tensors, _ = load_message(tmp_path / "m")
    except Refused:
        return
    assert tensors.keys() == {"x", "y"}


def test_a_header_that_would_fill_the_memory_is_refused(tmp_path):
    (tmp_path / "m").write_bytes((50_000_000).to_bytes(8, "little") + b"{" + b" " * 50_000_000)
    with pytest.raises(Refused, match="lists its tensors in 50000000 bytes"):
        load_message(tmp_path / "m")
