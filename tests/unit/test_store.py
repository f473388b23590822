"""A run's folder: what is written comes back, and whatever happens the last checkpoint is whole."""

from __future__ import annotations

import errno
import json
import subprocess
import sys

import pytest
import torch
from filelock import FileLock
from safetensors import safe_open

from fedllm.core.errors import FedllmError
from fedllm.core.types import State
from fedllm.runtime import store
from fedllm.runtime.store import (
    Checkpoint,
    append_event,
    load_checkpoint,
    locked,
    new_run,
    read_events,
    save_checkpoint,
    trim_events,
    write_text,
)


def checkpoint(number, size=3):
    draw = torch.Generator().manual_seed(number)
    params = {"model.layers.0/x": torch.randn(size, generator=draw), "y": torch.randn(2, 2, generator=draw).bfloat16()}
    state = State(number, params, {"m/y": torch.ones(2)}, {"0.clip/z": torch.ones((), dtype=torch.int64)})
    return Checkpoint(
        state, {"hospital.a/b": {"work/k": torch.ones(2), "1.top 0.1/x": torch.zeros(3)}, "é": {"k": torch.ones(1)}}
    )


def equal(left, right):
    return left.keys() == right.keys() and all(
        left[name].dtype == right[name].dtype and torch.equal(left[name], right[name]) for name in left
    )


def same(left, right):
    assert left.state.round == right.state.round and list(left.memory) == list(right.memory)
    assert all(equal(one, other) for one, other in zip(left.state[1:], right.state[1:], strict=True))
    assert all(equal(left.memory[name], right.memory[name]) for name in left.memory)


def test_a_checkpoint_comes_back_with_what_the_silos_remember(tmp_path):
    save_checkpoint(tmp_path, checkpoint(7))
    same(load_checkpoint(tmp_path), checkpoint(7))


def test_a_new_run_has_no_checkpoint_and_no_events(tmp_path):
    assert load_checkpoint(tmp_path) is None and read_events(tmp_path) == []


def test_the_last_checkpoint_counts_and_the_one_before_it_is_kept(tmp_path):
    for number in range(1, 12):
        save_checkpoint(tmp_path, checkpoint(number))
    assert load_checkpoint(tmp_path).state.round == 11
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["round-000010.safetensors", "round-000011.safetensors"]


def test_a_view_is_stored_by_its_own_values(tmp_path):
    whole = torch.arange(6.0)
    save_checkpoint(tmp_path, Checkpoint(State(1, {"a": whole[:2], "b": whole.view(2, 3).T}, {}, {}), {}))
    params = load_checkpoint(tmp_path).state.params
    assert params["a"].tolist() == [0.0, 1.0] and params["b"].tolist() == [[0, 3], [1, 4], [2, 5]]


def test_a_checkpoint_is_safetensors(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    with safe_open(tmp_path / "checkpoints" / "round-000001.safetensors", "pt") as file:
        assert "params/y" in file.keys()  # noqa: SIM118
        assert json.loads(file.metadata()["silos"]) == ["hospital.a/b", "é"]


def test_a_checkpoint_that_cannot_be_read_is_named_with_the_remedy(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    path = tmp_path / "checkpoints" / "round-000002.safetensors"
    path.write_bytes(path.read_bytes()[:50])
    with pytest.raises(FedllmError, match=r"round-000002.*delete it to go on from the one before"):
        load_checkpoint(tmp_path)
    path.unlink()
    same(load_checkpoint(tmp_path), checkpoint(1))


def test_what_a_kill_left_beside_a_checkpoint_is_not_one(tmp_path):
    save_checkpoint(tmp_path, checkpoint(1))
    (tmp_path / "checkpoints" / ".round-000002.safetensors.new").write_bytes(b"half")
    same(load_checkpoint(tmp_path), checkpoint(1))
    save_checkpoint(tmp_path, checkpoint(2))
    assert not list((tmp_path / "checkpoints").glob(".*"))


def test_events_are_cut_to_the_checkpoint(tmp_path):
    for number in (0, 1, 2, 3):
        append_event(tmp_path, {"event": "round", "round": number} if number else {"event": "start"})
    assert [event.get("round") for event in trim_events(tmp_path, 2)] == [None, 1, 2]
    assert [event.get("round") for event in read_events(tmp_path)] == [None, 1, 2]


def test_half_a_last_line_is_dropped(tmp_path):
    append_event(tmp_path, {"event": "start", "name": "é"})
    with (tmp_path / "events.jsonl").open("ab") as file:
        file.write(b'{"event": "round", "rou')
    assert read_events(tmp_path) == [{"event": "start", "name": "é"}]
    assert trim_events(tmp_path, 5) == [{"event": "start", "name": "é"}]
    append_event(tmp_path, {"event": "round", "round": 1})
    assert [event["event"] for event in read_events(tmp_path)] == ["start", "round"]


def test_a_second_lock_is_refused_until_the_first_goes(tmp_path):
    with (
        FileLock(tmp_path / "lock"),
        pytest.raises(FedllmError, match="Another process works on the run"),
        locked(tmp_path),
    ):
        pass
    with locked(tmp_path):
        pass


def test_another_process_is_refused(tmp_path):
    code = (
        "import sys\nfrom pathlib import Path\nfrom fedllm.core.errors import FedllmError\n"
        "from fedllm.runtime.store import locked\n"
        "try:\n    with locked(Path(sys.argv[1])): print('in')\nexcept FedllmError as error: print(error)\n"
    )

    def other():
        return subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True).stdout

    with locked(tmp_path):
        assert "Another process works on the run" in other()
    assert other() == "in\n"


def test_a_lock_goes_with_an_exception(tmp_path):
    with pytest.raises(KeyError), locked(tmp_path):
        raise KeyError
    with locked(tmp_path):
        pass


def test_no_folder_is_no_run(tmp_path):
    with pytest.raises(FedllmError, match=r"There is no run folder .*gone"), locked(tmp_path / "gone"):
        pass


def test_a_folder_with_something_in_it_is_not_a_new_run(tmp_path):
    new_run(tmp_path / "deep" / "run")
    new_run(tmp_path / "deep" / "run")
    (tmp_path / "deep" / "run" / "file").write_text("x")
    with pytest.raises(FedllmError, match=r"exists already; go on with `fedllm resume .*` or choose another --out"):
        new_run(tmp_path / "deep" / "run")


FULL = OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_leaves_the_checkpoint_before_and_nothing_half(tmp_path, monkeypatch):
    save_checkpoint(tmp_path, checkpoint(1))

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise FULL

    monkeypatch.setattr(store, "save_file", full)
    with pytest.raises(FedllmError, match=r"round-000002.*No space left on device.*make room.*resume the run"):
        save_checkpoint(tmp_path, checkpoint(2))
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["round-000001.safetensors"]
    same(load_checkpoint(tmp_path), checkpoint(1))


def test_a_file_that_may_not_grow_gives_one_sentence_and_loses_nothing(tmp_path):
    code = """
import resource, sys
from pathlib import Path
import torch
from fedllm.core.errors import FedllmError
from fedllm.core.types import State
from fedllm.runtime.store import *
folder = Path(sys.argv[1])
save_checkpoint(folder, Checkpoint(State(1, {"x": torch.ones(10)}, {}, {}), {}))
append_event(folder, {"round": 1})
write_text(folder / "text", "short")
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
for attempt in (
    lambda: save_checkpoint(folder, Checkpoint(State(2, {"x": torch.ones(10_000)}, {}, {}), {})),
    lambda: write_text(folder / "text", "x" * 10_000),
    lambda: append_event(folder, {"round": 2, "text": "x" * 10_000}),
):
    try:
        attempt()
        print("written")
    except FedllmError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("cannot be written" in line and "make room" in line for line in lines)
    assert load_checkpoint(tmp_path).state.params["x"].tolist() == [1.0] * 10
    assert (tmp_path / "text").read_text() == "short"
    assert read_events(tmp_path) == [{"round": 1}]
    assert trim_events(tmp_path, 1) == [{"round": 1}]
    assert not [path for path in tmp_path.rglob(".*") if path.name.endswith(".new")]
    save_checkpoint(tmp_path, checkpoint(2))
    same(load_checkpoint(tmp_path), checkpoint(2))


def test_text_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "recipe.toml"
    write_text(path, "é")
    assert path.read_text(encoding="utf-8") == "é"

    def broken(self, target):
        raise FULL

    monkeypatch.setattr(type(path), "replace", broken)
    with pytest.raises(FedllmError, match="cannot be written"):
        write_text(path, "other")
    assert path.read_text(encoding="utf-8") == "é" and [p.name for p in tmp_path.iterdir()] == ["recipe.toml"]
