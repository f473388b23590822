"""The command line: what is wrong is one sentence and exit code 2, and nothing is lost or left half made."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from fedllm.app.cli import main
from tests.tiny import write_model, write_rows

ROOT = Path(__file__).parents[2]
RECIPE = """
name = "tiny"
model = "model"
dtype = "float32"
device = "cpu"
threads = 1
rounds = 2
[client]
steps = 2
batch_size = 4
[evaluate]
alone = false
[silos]
a = "a.jsonl"
b = "b.jsonl"
"""


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder with a tiny model, the text of two silos and a recipe, to work in."""
    write_model(tmp_path / "model", chat=True)
    for name in "ab":
        rows = [{"prompt": f"{name} {i}?", "response": f"the cat sat {i}"} for i in range(40)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    (tmp_path / "tiny.toml").write_text(RECIPE)
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "broken.jsonl").write_text('{"prompt": "a", "response": "b"}\n{"prompt": \n')
    (tmp_path / "other.jsonl").write_text("".join(f'{{"question": "a{i}", "response": "b"}}\n' for i in range(9)))
    (tmp_path / "words.toml").write_text("these are words")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def call(monkeypatch, capsys, *words: str) -> tuple[int, str, str]:
    """Return the exit code and what was printed."""
    monkeypatch.setattr(sys, "argv", ["fedllm", *words])
    try:
        main()
        code = 0
    except SystemExit as end:
        code = int(end.code or 0)
    return code, *capsys.readouterr()


def start(place: Path, *words: str) -> subprocess.Popen[str]:
    """Start the command line as a process of its own."""
    return subprocess.Popen(
        [sys.executable, "-m", "fedllm", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def until(true, process: subprocess.Popen[str], seconds: float = 120) -> None:
    """Wait for something, at most so long."""
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end and process.poll() is None, process.communicate()
        time.sleep(0.02)


MISTAKES = {
    "a missing file": (["--set", "silos.c=no.jsonl"], "no.jsonl does not exist; give the path of a file"),
    "an empty silo": (["--set", "silos.c=empty.jsonl"], "empty.jsonl has no rows; give a source with at least one"),
    "broken JSON": (["--set", "silos.c=broken.jsonl"], "broken.jsonl, line 2: broken JSON"),
    "a column": (["--set", "silos.c=other.jsonl"], "silos.c, row 1: no columns 'prompt' and 'response'"),
    "a key": (["--set", "ruonds=3"], "the key 'ruonds' is unknown; did you mean 'rounds'?"),
    "an inner key": (["--set", "data.limit_trian=3"], "'data.limit_trian' is unknown; did you mean 'limit_train'?"),
    "a setting": (["--set", "client.larning_rate=1"], "did you mean 'learning_rate'?"),
    "a name": (["--set", "optimiser=fedadm"], "optimiser.name 'fedadm' is unknown; did you mean 'fedadam'?"),
    "a table without a name": (["--set", "partition.source=a.jsonl"], "[partition] has no 'name'; say which"),
    "no text": (["--set", "silos={}"], "needs either [silos] (name = file) or [partition]"),
    "a type": (["--set", "rounds=many"], "'rounds' is 'many'; input should be a valid integer"),
    "a setting's type": (["--set", "client.steps=few"], "client.steps is 'few'; input should be a valid integer"),
    "no equals": (["--set", "rounds"], "--set 'rounds' has no '='; write it as key.path=value."),
    "a module": (["--set", 'trainable.target_modules=["qkv"]'], "aim trainable.target_modules at some of: down_proj"),
    "the cohort": (
        ["--set", "runtime=cohort", "--set", "trainable.dropout=0.1"],
        "runtime is 'cohort', which trains plain LoRA without dropout",
    ),
    "a model": (["--set", "model=no/such-model"], "There is no model 'no/such-model': not a local folder"),
    "a folder that is no model": (["--set", "model=."], "is not a transformers model"),
    "a device": (["--set", "device=cuda:63"], "device is 'cuda:63', which this machine does not have"),
    "a score file": (["--set", "evaluate.choice.q=no.jsonl"], "no.jsonl does not exist"),
    "a score file's columns": (["--set", "evaluate.exact.q=a.jsonl"], "row 1, has no column 'answer'"),
}


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_is_one_sentence_and_leaves_nothing_behind(place, monkeypatch, capsys, mistake):
    # The hub cannot be reached, whatever this machine's network is.
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    before = sorted(place.rglob("*"))
    settings, sentence = MISTAKES[mistake]
    code, _, said = call(monkeypatch, capsys, "run", "tiny.toml", *settings)
    assert code == 2 and sentence in said
    assert said.startswith("Error: ") and said.count("\n") == 1 and said.rstrip()[-1] in ".?"
    assert "Traceback" not in said
    assert sorted(place.rglob("*")) == before


def test_a_mended_command_works_and_a_second_one_is_refused(place, monkeypatch, capsys):
    assert call(monkeypatch, capsys, "run", "tiny.toml", "--set", "client.steps=0", "--out", "out/run")[0] == 2
    code, said, wrong = call(monkeypatch, capsys, "run", "tiny.toml", "--out", "out/run")
    assert (code, wrong) == (0, "") and "Held-out loss per silo" in said and "out/run/report.html" in said
    code, _, wrong = call(monkeypatch, capsys, "run", "tiny.toml", "--out", "out/run")
    assert code == 2
    assert wrong == (
        "Error: The run folder 'out/run' exists already; go on with `fedllm resume out/run` or choose another --out.\n"
    )
    for command in ("evaluate", "report", "chat"):
        monkeypatch.setattr("sys.stdin", open(os.devnull))  # noqa: PTH123, SIM115
        assert call(monkeypatch, capsys, command, "out/run")[0] == 0


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["run", "no.toml"], "There is no recipe 'no.toml'; give the path of a TOML file."),
        (["run", "words.toml"], "The recipe 'words.toml' is not TOML: "),
        (["run", "model"], "The recipe 'model' is not TOML: "),
        (["resume", "model"], "There is no run in 'model'; give the folder that `fedllm run` made."),
        (["resume", "nowhere"], "There is no run in 'nowhere'; give the folder that `fedllm run` made."),
        (["report", "nowhere"], "There is no run in 'nowhere'; give the folder that `fedllm run` made."),
        (["evaluate", "nowhere"], "There is no run, adapter or model in 'nowhere'; give a folder"),
        (["chat", "nowhere"], "There is no run, adapter or model in 'nowhere'; give a folder"),
        (["export", "nowhere"], "There is no run, adapter or model in 'nowhere'; give a folder"),
    ],
)
def test_a_wrong_path_is_one_sentence(place, monkeypatch, capsys, words, sentence):
    before = sorted(place.rglob("*"))
    code, _, said = call(monkeypatch, capsys, *words)
    assert code == 2 and said.startswith(f"Error: {sentence}") and said.count("\n") == 1
    assert sorted(place.rglob("*")) == before


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ((), ("aggregate: mean", "on the wire", "memory", "2 silos, 2 rounds")),
        (("silos={a='a.jsonl'}", "rounds=1", "canaries.count=4"), ("1 silo, 1 round,",)),
        (
            ("duplicates.text=prompt",),
            ("silo    salted hashes of the texts", "server  tell each silo what another one keeps"),
        ),
    ],
)
def test_plan_prints_and_makes_nothing(place, monkeypatch, capsys, settings, words):
    before = sorted(place.rglob("*"))
    code, said, wrong = call(monkeypatch, capsys, "plan", "tiny.toml", *(f"--set={each}" for each in settings))
    assert (code, wrong) == (0, "")
    for word in words:
        assert word in said
    assert sorted(place.rglob("*")) == before


def test_help_needs_no_heavy_library():
    code = (
        "import sys; sys.argv = ['fedllm', '--help']\n"
        "from fedllm.app.cli import main\n"
        "try: main()\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'peft', 'numpy', 'datasets', 'pydantic'} & set(sys.modules)\n"
        "print(heavy, file=sys.stderr)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert "quickstart" in done.stdout and done.stderr.strip() == "set()"


def test_a_mistake_in_a_process_of_its_own(place):
    process = start(place, "run", "tiny.toml", "--set", "silos.c=broken.jsonl")
    said, wrong = process.communicate(timeout=120)
    assert process.returncode == 2 and "broken.jsonl, line 2: broken JSON" in wrong and "Traceback" not in said + wrong
    assert not (place / "runs").exists()


def test_ctrl_c_stops_after_the_step_and_resume_finishes(place, monkeypatch, capsys):
    process = start(place, "run", "tiny.toml", "--set", "rounds=100000", "--out", "run")
    until(lambda: list((place / "run" / "checkpoints").glob("*.safetensors")), process)

    # While it works nobody else may.
    code, _, wrong = call(monkeypatch, capsys, "resume", "run")
    assert (code, wrong) == (2, "Error: Another process works on the run 'run'; wait for it or stop it first.\n")

    process.send_signal(signal.SIGINT)
    said, wrong = process.communicate(timeout=120)
    assert process.returncode == 2
    assert "Stopping after this step; press Ctrl-C again to stop at once." in said
    assert wrong == "Stopped; `fedllm resume run` goes on from the last round.\n"

    done = sum('"event": "round"' in line for line in (place / "run" / "events.jsonl").read_text().splitlines())
    recipe = place / "run" / "recipe.toml"
    recipe.write_text(recipe.read_text().replace("rounds = 100000", f"rounds = {done + 1}"))
    code, said, wrong = call(monkeypatch, capsys, "resume", "run")
    assert (code, wrong) == (0, "") and f"round {done + 1} of {done + 1}: " in said
    metrics = json.loads((place / "run" / "metrics.json").read_text())
    assert metrics["rounds"] == done + 1 and (place / "run" / "adapter" / "adapter_model.safetensors").is_file()
