"""What is done with a finished run: open it, measure it, talk to it, export it."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import pytest
import torch
from rich.console import Console

import fedllm.app.run
from fedllm.app.chat import fitting, talk
from fedllm.app.evaluate import evaluate
from fedllm.app.export import export_run
from fedllm.app.result import open_result
from fedllm.core.errors import FedllmError
from fedllm.silo.templates import Turn
from tests.tiny import tiny_model, tiny_tokenizer, write_model, write_rows

WORDS = ["cat", "mat", "sun", "sea", "red", "tin", "owl", "bee"]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A folder with the tiny model, two silos' text, and one small run of them."""
    place = tmp_path_factory.mktemp("made")
    write_model(place / "model", chat=True)
    for name in "ab":
        rows = [{"prompt": f"{name} {i}?", "response": f"the {WORDS[i % 8]} sat {i}"} for i in range(40)]
        write_rows(place / f"{name}.jsonl", rows)
    fedllm.app.run.run(recipe(place), place / "run")
    return place


def recipe(place: Path, **changes):
    return {
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "threads": 1,
        "rounds": 2,
        "silos": {"a": "a.jsonl", "b": "b.jsonl"},
        "data": {"root": str(place)},
        "client": {"steps": 2, "batch_size": 4, "learning_rate": 1e-2},
        "evaluate": {"alone": False},
        **changes,
    }


def logits(model):
    ids = torch.arange(3, 40).view(1, -1)
    with torch.no_grad():
        return model(input_ids=ids).logits


def shown(measured) -> str:
    console = Console(file=io.StringIO(), width=120)
    console.print(measured)
    return console.file.getvalue()


def test_the_adapter_is_an_ordinary_peft_folder_and_merges_into_an_ordinary_model(made):
    from peft import PeftModel
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    base = AutoModelForCausalLM.from_pretrained(made / "model", dtype=torch.float32)
    before = logits(base)
    adapted = logits(PeftModel.from_pretrained(base, made / "run" / "adapter"))
    target = export_run(made / "run", made / "merged", merged=True)
    merged = AutoModelForCausalLM.from_pretrained(target)
    assert merged.dtype == torch.float32 and type(merged).__name__ == "LlamaForCausalLM"
    assert (adapted - before).abs().max() > 1e-2
    torch.testing.assert_close(logits(merged), adapted, atol=1e-5, rtol=1e-5)
    assert AutoTokenizer.from_pretrained(target).chat_template
    assert (target / "generation_config.json").is_file()
    assert not list(target.glob("*.bin")) and not list(made.glob(".*"))

    last = load_file(made / "run" / "checkpoints" / "round-000002.safetensors")
    kept = load_file(made / "run" / "adapter" / "adapter_model.safetensors")
    assert sum(name.startswith("params") for name in last) == len(kept)


def test_merging_keeps_the_type_that_the_base_has_on_disk(made, tmp_path):
    from transformers import AutoModelForCausalLM

    tiny_model().to(torch.bfloat16).save_pretrained(tmp_path / "model")
    tiny_tokenizer(chat=True).save_pretrained(tmp_path / "model")
    adapter = shutil.copytree(made / "run" / "adapter", tmp_path / "adapter")
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps(config | {"base_model_name_or_path": str(tmp_path / "model")})
    )
    merged = AutoModelForCausalLM.from_pretrained(export_run(adapter, tmp_path / "merged", merged=True))
    assert merged.dtype == torch.bfloat16


def test_a_run_is_opened_from_any_folder_and_its_text_found(made, tmp_path, monkeypatch):
    monkeypatch.chdir(made)
    fedllm.app.run.run(recipe(made, model="model", data={"root": "."}, rounds=1), tmp_path / "run")
    monkeypatch.chdir(tmp_path)
    assert "b " in shown(evaluate(Path("run"), [], 5))


def test_the_base_is_the_model_before_and_the_result_the_one_after(made):
    result, base = open_result(made / "run"), open_result(made / "run", base=True)
    with result.as_base():
        torch.testing.assert_close(logits(result.model), logits(base.model))
    assert (logits(result.model) - logits(base.model)).abs().max() > 1e-2


def test_an_unfinished_run_gives_its_last_checkpoint(made, tmp_path):
    unfinished = shutil.copytree(made / "run", tmp_path / "run", ignore=shutil.ignore_patterns("adapter", "metrics*"))
    lines = (unfinished / "events.jsonl").read_text().splitlines(keepends=True)
    (unfinished / "events.jsonl").write_text("".join(line for line in lines if '"done"' not in line))
    opened = open_result(unfinished)
    assert opened.note.endswith("after round 2 of 2")
    torch.testing.assert_close(logits(opened.model), logits(open_result(made / "run").model))
    assert (export_run(unfinished) / "adapter_model.safetensors").is_file()

    shutil.rmtree(unfinished / "checkpoints")
    with pytest.raises(FedllmError, match=r"has not come to the end of a round; `fedllm resume"):
        open_result(unfinished)


def test_all_weights_trained_are_a_model_folder(made, tmp_path):
    run = fedllm.app.run.run(recipe(made, trainable={"name": "full"}), tmp_path / "full")
    assert (run / "model" / "model.safetensors").is_file()
    assert "base" in shown(evaluate(run, [], 5))
    merged = open_result(export_run(run, merged=True), dtype="float32")
    torch.testing.assert_close(logits(merged.model), logits(open_result(run).model))


def test_a_soft_prompt_is_measured_but_not_merged(made, tmp_path):
    run = fedllm.app.run.run(recipe(made, trainable={"name": "prompt", "tokens": 3}, rounds=1), tmp_path / "soft")
    metrics = json.loads((run / "metrics.json").read_text())["loss"]
    text = shown(evaluate(run, [], 5))
    for kind in ("base", "federated"):
        assert f"{metrics[kind]['a']:.3f}" in text
    with pytest.raises(FedllmError, match=r"has no weights to merge into"):
        export_run(run, merged=True)
    assert not (run / "merged").exists()
    console = Console(file=io.StringIO(), width=100)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.stdin", io.StringIO("hello\n"))
        talk(run, 4, False, console)
    assert "model:" in console.file.getvalue()


def test_evaluate_shows_the_losses_of_the_run(made):
    metrics = json.loads((made / "run" / "metrics.json").read_text())
    text = shown(evaluate(made / "run", [], 5))
    for kind in ("base", "federated"):
        for silo in "ab":
            assert f"{metrics['loss'][kind][silo]:.3f}" in text
    assert "perplexity" in text


def test_evaluate_measures_a_file_by_its_columns(made, tmp_path):
    files = {
        "choice": {"question": "Where is the cat?", "choices": ["on the mat", "in the sea"], "answer": 0},
        "exact": {"prompt": "1 + 1?", "answer": "2"},
        "said": {"prompt": "a 1?", "response": "the mat sat 1"},
        "told": {"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "hello"}]},
        "plain": {"text": "the cat sat on the mat"},
        "odd": {"foo": 1, "bar": 2},
    }
    for name, row in files.items():
        (tmp_path / f"{name}.jsonl").write_text(f"{json.dumps(row)}\n" * 3)
    paths = [str(tmp_path / f"{name}.jsonl") for name in files]
    for target in (made / "run", made / "run" / "adapter", made / "model"):
        text = shown(evaluate(target, paths[:-1], 2))
        assert "multiple choice, 2 questions" in text and "exact match, 2 questions" in text
        assert text.count("perplexity") == 3
        assert ("base" in text) == (target != made / "model")
    with pytest.raises(FedllmError, match=r"odd.jsonl has the columns bar, foo; rename them to one of: question, cho"):
        evaluate(made / "run", paths[-1:], 2)
    with pytest.raises(FedllmError, match=r"is not a run, which has text of its own; name some with --data FILE"):
        evaluate(made / "model", [], 2)


@pytest.mark.parametrize("base", [False, True])
def test_chat_through_a_pipe(made, monkeypatch, base):
    monkeypatch.setattr("sys.stdin", io.StringIO(f"hello\n\n/reset\n{'long ' * 400}\nagain [/]\n"))
    console = Console(file=io.StringIO(), width=80)
    talk(made / "run", 8, base, console)
    text = console.file.getvalue()
    assert text.count("\nmodel:") == 2 and text.startswith("the base model" if base else "the run")
    assert "(forgotten)" in text and "that is longer than" in text and "you: again [/]" in text


def test_a_long_talk_forgets_its_oldest_turns():
    tokenizer = tiny_tokenizer(chat=True)
    turns = [Turn(role, "word " * 5) for _ in range(6) for role in ("user", "assistant")][:-1]
    kept, dropped = fitting(tokenizer, turns, 120)
    assert dropped and dropped % 2 == 0 and kept == turns[dropped:] and kept[0].role == "user"
    assert fitting(tokenizer, turns[:1], 3) == ([], 2)


def test_exports_go_to_new_folders_only(made, tmp_path):
    target = export_run(made / "run", tmp_path / "out")
    names = sorted(path.name for path in target.iterdir())
    assert "adapter_model.safetensors" in names and "adapter_config.json" in names
    for merged in (False, True):
        with pytest.raises(FedllmError, match=r"out' exists already; remove it or choose another folder with --to"):
            export_run(made / "run", tmp_path / "out", merged)
    with pytest.raises(FedllmError, match=r"There is no run, adapter or model in"):
        export_run(tmp_path / "none", merged=True)
    (tmp_path / "file").write_text("")
    with pytest.raises(FedllmError, match=r"cannot be written \(Not a directory\)"):
        export_run(made / "run", tmp_path / "file" / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["file", "out"]
