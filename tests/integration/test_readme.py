"""The README's example runs as it stands, on a tiny model and two small files."""

from __future__ import annotations

import re
from pathlib import Path

from tests.tiny import write_model, write_rows

README = Path(__file__).resolve().parents[2] / "README.md"


def test_the_example_runs_and_is_twelve_lines(tmp_path, monkeypatch, capsys):
    (example,) = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    statements = [line for line in example.splitlines() if line.strip() and not line.startswith("import")]
    assert len(statements) == 12
    write_model(tmp_path / "model", chat=True)
    for name in "ab":
        rows = [{"prompt": f"what is {name} {i}", "response": f"it is number {i}"} for i in range(12)]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    monkeypatch.chdir(tmp_path)
    exec(compile(example.replace("smollm2-135m-instruct", "model"), "README.md", "exec"), {})
    assert "3 {'train_loss.a'" in capsys.readouterr().out
