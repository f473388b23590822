"""What an administrator may ask: runs are folders, names never leave them, and two do not get the same one."""

from __future__ import annotations

import base64
import json

import pytest

from fedllm.federation.consortium import Consortium, write_consortium
from fedllm.federation.server import commands

USER = "admin@example.org"


@pytest.fixture
def folder(tmp_path):
    consortium = Consortium.model_validate(
        {"name": "demo", "admin": USER, "sites": ["a", "b"], "server": {"address": "127.0.0.1"}}
    )
    (tmp_path / "consortium.toml").write_text(write_consortium(consortium))
    (tmp_path / "revoked.json").write_text('{"names": ["b"], "serials": []}')
    (tmp_path / "runs").mkdir()
    return tmp_path


def ask(folder, do, **head):
    return commands.answer(folder, USER, {"do": do, **head})


def test_a_run_is_submitted_once_and_seen(folder):
    assert ask(folder, "submit", name="one", recipe="rounds = 1") == {"name": "one", "sites": ["a"]}
    assert "There is a run 'one' already" in ask(folder, "submit", name="one", recipe="")["error"]
    told = ask(folder, "status")
    assert told["runs"]["one"]["state"] == "waiting" and told["runs"]["one"]["user"] == USER
    assert told["sites"]["b"] == {"connected": False, "revoked": True}
    assert [path.name for path in (folder / "runs").iterdir()] == ["one"]


def test_stop_and_resume_are_wishes_that_are_counted(folder):
    ask(folder, "submit", name="one", recipe="")
    ask(folder, "stop", name="one")
    ask(folder, "resume", name="one")
    wish = json.loads((folder / "runs" / "one" / "run.json").read_text())
    assert (wish["wanted"], wish["asked"], wish["sites"]) == ("run", 3, ["a"])


def test_what_the_server_said_before_a_wish_is_not_its_answer(folder):
    ask(folder, "submit", name="one", recipe="")
    said = {"state": "failed", "reason": "the disk was full", "asked": 1, "attempt": 3}
    (folder / "runs" / "one" / "engine.json").write_text(json.dumps(said))
    assert ask(folder, "status", name="one")["runs"]["one"]["state"] == "failed"
    ask(folder, "resume", name="one")
    told = ask(folder, "status", name="one")["runs"]["one"]
    assert (told["state"], told["reason"], told["attempt"]) == ("waiting", "", 3)
    (folder / "runs" / "one" / "engine.json").write_text(json.dumps({**said, "asked": 2}))
    assert ask(folder, "status", name="one")["runs"]["one"]["state"] == "failed"


@pytest.mark.parametrize("name", ["../x", "/etc", ".hidden", "", "a/b", None, 3, "a" * 65])
@pytest.mark.parametrize("do", ["submit", "stop", "resume", "logs", "files", "read"])
def test_no_name_leaves_the_runs(folder, do, name):
    assert "is no name for a run" in ask(folder, do, name=name, recipe="")["error"]


def test_files_are_read_in_parts_and_only_a_runs_own(folder, monkeypatch):
    ask(folder, "submit", name="one", recipe="x = 1")
    run = folder / "runs" / "one"
    (run / "adapter").mkdir()
    (run / "adapter" / "w").write_bytes(bytes(range(100)))
    (run / "link").symlink_to(folder / "consortium.toml")
    (run / "attempt.lock").touch()
    listed = ask(folder, "files", name="one")["files"]
    assert set(listed) == {"recipe.toml", "run.json", "adapter/w"} and listed["adapter/w"] == 100
    monkeypatch.setattr(commands, "CHUNK", 64)
    parts = [ask(folder, "read", name="one", path="adapter/w", offset=at)["data"] for at in (0, 64, 100)]
    assert b"".join(map(base64.b64decode, parts)) == bytes(range(100))
    for path in ("../../consortium.toml", str(folder / "consortium.toml"), "link", "attempt.lock", "none", "adapter"):
        assert "has no file" in ask(folder, "read", name="one", path=path)["error"]


@pytest.mark.parametrize(
    "head",
    [
        {},
        {"do": None},
        {"do": "rm"},
        {"do": "submit", "name": "x", "recipe": 3},
        {"do": "submit", "name": "x", "recipe": "["},
    ],
)
def test_what_cannot_be_done_is_an_answer(folder, head):
    assert "error" in commands.answer(folder, USER, head)


@pytest.mark.parametrize("head", [{"do": "read", "path": "run.json", "offset": "x"}, {"do": "logs", "lines": []}])
def test_a_number_that_is_none_is_an_answer(folder, head):
    ask(folder, "submit", name="one", recipe="")
    assert "error" in commands.answer(folder, USER, {"name": "one", **head})
