"""A learned prompt as files for use elsewhere: JSON, TOML, plain text, and a program that asks with it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomli_w

ASK = '''"""Ask a model behind an OpenAI-compatible API with the prompt in this folder: python ask.py URL MODEL TEXT."""

import json
import os
import sys
from pathlib import Path

from openai import OpenAI

url, model, text = sys.argv[1:4]
prompt = json.loads(Path(__file__).with_name("prompt.json").read_text(encoding="utf-8"))
client = OpenAI(base_url=url, api_key=os.environ.get("OPENAI_API_KEY", "none"))
asked = prompt["prompt"].replace("{text}", text)
if prompt["answers"]:
    # The likeliest of the answers, by its log-probability after the prompt.
    scores = {}
    for word in prompt["answers"]:
        told = client.completions.create(model=model, prompt=f"{asked} {word}", echo=True, logprobs=1, max_tokens=1)
        lines = told.choices[0].logprobs
        ends = [*lines.text_offset[1:], len(told.choices[0].text)]
        whole = len(asked) + 1 + len(word)
        scores[word] = sum(p for p, end in zip(lines.token_logprobs, ends) if len(asked) < end <= whole)
    print(max(scores, key=scores.get))
else:
    told = client.chat.completions.create(model=model, messages=[{"role": "user", "content": asked}], temperature=0)
    print(told.choices[0].message.content)
'''


def write_prompt(folder: Path, prompt: str, answers: Sequence[str], **more: Any) -> None:
    """Write a prompt, {text} where the question goes, and the answers that there are, if the answer is a word."""
    folder.mkdir(parents=True, exist_ok=True)
    table: Mapping[str, Any] = {"prompt": prompt, "answers": list(answers), **more}
    (folder / "prompt.json").write_text(json.dumps(table, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    (folder / "prompt.toml").write_text(tomli_w.dumps(table, multiline_strings=True), encoding="utf-8")
    (folder / "prompt.txt").write_text(prompt, encoding="utf-8")
    (folder / "ask.py").write_text(ASK, encoding="utf-8")
