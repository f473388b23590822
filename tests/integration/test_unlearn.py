"""A silo or rows are forgotten: the bits of a run that never had them, a certificate, and what cannot be meant."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from fedllm.app.certificate import checked, private_key, read_certificate, write_certificate
from fedllm.app.cli import app, main
from fedllm.app.run import run
from fedllm.app.unlearn import Wish, unlearn
from fedllm.core.errors import FedllmError
from fedllm.runtime.store import load_checkpoint, read_events
from tests.tiny import write_model

NAMES = "abc"


def rows_of(name, count=12):
    return [{"prompt": f"{name} {place}?", "response": f"the cat sat {place}"} for place in range(count)]


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    place = tmp_path_factory.mktemp("unlearn")
    write_model(place / "model", chat=True)
    for name in NAMES:
        write_rows(place / f"{name}.jsonl", rows_of(name))
        write_rows(place / f"{name}-test.jsonl", rows_of(f"test {name}", 4))
    return place


def recipe(place, **changes):
    return {
        "name": "old",
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "rounds": 4,
        "silos": {name: {"train": f"{name}.jsonl", "test": f"{name}-test.jsonl"} for name in NAMES},
        "data": {"root": str(place)},
        "trainable": {"name": "lora", "dropout": 0.1},
        "client": {"steps": 4, "batch_size": 4, "keep_optimiser": True},
        "evaluate": {"alone": False},
        # Silo c comes late: what was before is as it was without it.
        "availability": {"silos": {"c": {"from": 3}}},
        "keep": {"checkpoints": 0, "norms": True},
        **changes,
    }


@pytest.fixture(scope="module")
def old(place):
    return run(recipe(place), place / "old")


def learned(folder):
    return load_checkpoint(folder).state.params


def equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def ask(*args):
    return CliRunner().invoke(app, [str(arg) for arg in args], catch_exceptions=True)


def plain(place, silos):
    """The recipe as it were had nobody else ever been named in it."""
    asked = recipe(place)
    asked["silos"] = {name: files for name, files in asked["silos"].items() if name in silos}
    kept = {name: says for name, says in asked["availability"]["silos"].items() if name in silos}
    return {**asked, "availability": {"silos": kept}}


def test_a_silo_is_forgotten_from_before_its_first_round_with_the_bits_of_a_run_without_it(place, old, tmp_path):
    before = {path.name: path.read_bytes() for path in (old / "checkpoints").iterdir()}
    # Its text may be gone already; then there is no attack, and the replay is the same.
    replay = unlearn(old, Wish("c"), tmp_path / "new")
    assert (replay.first, replay.checkpoint.name) == (3, "round-000002.safetensors")
    straight = run(plain(place, "ab"), tmp_path / "straight")
    assert equal(learned(tmp_path / "new"), learned(straight)) and not equal(learned(old), learned(straight))
    memory = load_checkpoint(tmp_path / "new").memory
    assert memory.keys() == load_checkpoint(straight).memory.keys() == {"a", "b"}
    assert all(equal(memory[name], load_checkpoint(straight).memory[name]) for name in memory)
    assert {path.name: path.read_bytes() for path in (old / "checkpoints").iterdir()} == before
    told = read_events(tmp_path / "new")
    assert [event["round"] for event in told if event["event"] == "round"] == [1, 2, 3, 4]
    assert all("c" not in event["asked"] and "c" not in event["loss"] for event in told if event["event"] == "round")


def test_without_a_checkpoint_of_that_time_all_rounds_are_replayed(place, old, tmp_path):
    replay = unlearn(old, Wish("a"), tmp_path / "new")
    assert (replay.first, replay.checkpoint) == (1, None)
    assert equal(learned(tmp_path / "new"), learned(run(plain(place, "bc"), tmp_path / "straight")))


def test_the_others_turns_are_as_they_were(place, tmp_path):
    """Where silos are drawn by chance, the replay asks those that were drawn, and begins where it can."""
    asked = recipe(place, select={"name": "fixed_size", "size": 2}, availability=None, rounds=5)
    folder = run({**asked, "seed": 2}, tmp_path / "old")
    turns = [event["asked"] for event in read_events(folder) if event["event"] == "round"]
    late = max(NAMES, key=lambda name: next(n for n, each in enumerate(turns) if name in each))
    replay = unlearn(folder, Wish(late), tmp_path / "new")
    assert replay.first == 1 + next(n for n, each in enumerate(turns) if late in each) > 1
    now = [event["asked"] for event in read_events(tmp_path / "new") if event["event"] == "round"]
    assert now == [[name for name in each if name != late] for each in turns]
    straight = run({**asked, "seed": 2, "without": {"silos": [late]}}, tmp_path / "straight")
    assert equal(learned(tmp_path / "new"), learned(straight))


def test_rows_are_forgotten_with_the_bits_of_a_run_on_a_file_that_lacks_them(place, old, tmp_path):
    gone = rows_of("c")[3:6]
    write_rows(tmp_path / "gone.jsonl", gone)
    write_rows(tmp_path / "left.jsonl", [row for row in rows_of("c") if row not in gone])
    new = tmp_path / "new"
    found = ask("unlearn", old, "--silo", "c", "--rows", tmp_path / "gone.jsonl", "--out", new)
    assert found.exit_code == 0, found.output
    assert "Replayed: 2 rounds, exact, without 3 rows of 'c'" in found.output
    files = {**recipe(place)["silos"], "c": {"train": str(tmp_path / "left.jsonl"), "test": "c-test.jsonl"}}
    assert equal(learned(new), learned(run(recipe(place, silos=files), tmp_path / "straight")))
    said = read_certificate(new / "certificate.json")
    assert said["removed"]["rows"] == 3 and said["verification"]["removed"] == 3
    # Nobody who keeps the run keeps the text of what was removed.
    assert not any(b"c 4?" in path.read_bytes() for path in new.rglob("*") if path.is_file() and path.suffix != ".html")


def test_the_command_attacks_certifies_and_reports(place, old, tmp_path):
    from cryptography.hazmat.primitives import serialization
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

    key = Ed25519PrivateKey.generate()
    pem, public = tmp_path / "key.pem", tmp_path / "public.pem"
    text = serialization.Encoding.PEM
    pem.write_bytes(key.private_bytes(text, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()))
    public.write_bytes(key.public_key().public_bytes(text, serialization.PublicFormat.SubjectPublicKeyInfo))
    command = ("unlearn", old, "--silo", "c", "--key", pem, "--out", tmp_path / "new", "--against", old)
    assert ask(*command).exit_code == 0
    path = tmp_path / "new" / "certificate.json"
    said = read_certificate(path)
    assert said["removed"] == {"silo": "c"} and said["method"] == "exact" and said["rounds_replayed"] == 2
    assert said["replayed_from"]["round"] == 2 and said["result"]["round"] == 4
    attack = said["verification"]
    assert (attack["removed"], attack["held_out"]) == (12, 4) and attack["base"]["auc_against_base"] == 0.5
    assert attack["before"] == attack["retrained"] != attack["after"]
    assert "What was forgotten" in (tmp_path / "new" / "report.html").read_text()
    good = ask("certificate", path, "--key", public)
    assert good.exit_code == 0 and "adapter_model.safetensors is the file that the certificate names" in good.output
    # Whatever is changed in it shows, and so does another file.
    path.write_text(json.dumps({**said, "method": "calibrated"}))
    assert ask("certificate", path, "--key", public).exit_code == 1
    with pytest.raises(FedllmError, match="it was changed, or another key signed it"):
        checked(path, public)
    write_certificate(path.parent, {k: v for k, v in said.items() if k != "signature"}, private_key(pem))
    (tmp_path / "new" / "adapter" / "adapter_model.safetensors").write_bytes(b"other")
    with pytest.raises(FedllmError, match="is not the file that the certificate is about"):
        checked(path, public)
    # The same call again finds the replay done, and certifies it anew.
    state = (tmp_path / "new" / "checkpoints" / "round-000004.safetensors").stat().st_mtime_ns
    path.unlink()
    unlearn(old, Wish("c"), tmp_path / "new")
    assert (tmp_path / "new" / "checkpoints" / "round-000004.safetensors").stat().st_mtime_ns == state


def test_calibrated_forgetting_takes_fewer_steps_of_the_recorded_length(place, old, tmp_path):
    norms = {event["round"]: event["norm"] for event in read_events(old) if event["event"] == "round"}
    assert norms[1].keys() == {"a", "b"} and norms[3].keys() == set(NAMES)
    replay = unlearn(old, Wish("a", calibrated=True, ratio=0.5, interval=2), tmp_path / "new")
    made = [event for event in read_events(tmp_path / "new") if event["event"] == "round"]
    assert replay.recipe.client["steps"] == 2 and len(made) == 2
    for event, number in zip(made, (1, 3), strict=True):
        expected = {name: value for name, value in norms[number].items() if name != "a"}
        assert event["norm"] == pytest.approx(expected, rel=1e-6) and event["clients"] == len(expected)


def test_what_was_forgotten_stays_forgotten_when_more_is(place, old, tmp_path):
    unlearn(old, Wish("c"), tmp_path / "first")
    replay = unlearn(tmp_path / "first", Wish("b"), tmp_path / "second")
    assert replay.recipe.without.silos == ["c", "b"] and replay.recipe.silos.keys() == set(NAMES)
    assert equal(learned(tmp_path / "second"), learned(run(plain(place, "a"), tmp_path / "straight")))
    with pytest.raises(FedllmError, match="'a' is the only silo"):
        unlearn(tmp_path / "second", Wish("a"))


def test_what_cannot_be_meant_is_a_sentence(place, old, tmp_path):
    write_rows(tmp_path / "odd.jsonl", [*rows_of("a")[:1], {"prompt": "never", "response": "there"}])
    for wish, sentence in (
        (Wish("d"), "has no silo 'd'; known: a, b, c"),
        (
            Wish("a", rows=tmp_path / "odd.jsonl"),
            r"1 of the 2 rows .* learned from \(first: row 2",
        ),
        (Wish("a", calibrated=True, ratio=0), "--ratio is 0"),
    ):
        with pytest.raises(FedllmError, match=sentence):
            unlearn(old, wish, tmp_path / "new")
    unfinished = tmp_path / "unfinished"
    shutil.copytree(old, unfinished)
    lines = (unfinished / "events.jsonl").read_text().splitlines()
    (unfinished / "events.jsonl").write_text("".join(f"{line}\n" for line in lines if '"event": "done"' not in line))
    with pytest.raises(FedllmError, match="is not finished; `fedllm resume"):
        unlearn(unfinished, Wish("a"))
    assert not (tmp_path / "new").exists()
    with pytest.raises(FedllmError, match="There is no run in"):
        unlearn(tmp_path, Wish("a"))
    with pytest.raises(FedllmError, match=r"keep\.norms is about updates as they are, and transforms has 'top_k'"):
        run(recipe(place, transforms=[{"name": "top_k", "fraction": 0.2}]), tmp_path / "x")
    with pytest.raises(FedllmError, match=r"without: there is no silo 'd'"):
        run(recipe(place, without={"silos": ["d"]}), tmp_path / "x")
    with pytest.raises(FedllmError, match=r"without\.silos leaves out all silos"):
        run(recipe(place, without={"silos": list(NAMES)}), tmp_path / "x")


def test_the_command_ends_with_two_for_what_the_user_can_mend(old, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["fedllm", "unlearn", str(old), "--silo", "d"])
    with pytest.raises(SystemExit) as end:
        main()
    assert end.value.code == 2 and "has no silo 'd'" in capsys.readouterr().err
    assert not Path(f"{old}-without-d").exists()
