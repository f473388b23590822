"""NVIDIA FLARE's own LoRA example beside the quickstart: four sites on this machine, two rounds, one thread each.

`python -m benchmarks.reference_flare_lora --example NVFlare/examples/advanced/llm_hf --python VENV/bin/python` needs
a checkout of NVFlare and an environment of its own with what the example asks for. The example runs by its
`job.py` in PEFT mode in the simulator, as its README says, from a copy in which two lines of `client.py` are changed,
which want a GPU: where the model is put, and what the trainer may use.

Equal: the model; the sites; their 32 rows of training and 20 held-out ones, cut to 128 tokens in the quickstart's chat;
each row once a round; FedAvg. The example has no option for what it learns, so `ours` takes the example's settings:
LoRA of rank 64 on q_proj and v_proj with dropout, bfloat16, recomputed activations, one step of 32 rows a round in
parts of 4, its AdamW, which is remembered between rounds. `quickstart` is the recipe on the same rows: rank 8 on four
projections, 4 steps of 8 rows.

Not equal: the example puts other words around a row (12 % fewer tokens than the chat), scores all its tokens
and not only the response's, counts entropy and accuracy, and keeps a checkpoint at each site every round. It looks at
the held-out rows before each round, ours before the first and after each, so once more. Its simulator starts all within
its own time, without TLS; ours are five processes with mutual TLS, whose start is told apart. Its bytes are all that
its server sent and received; ours are the messages of training. `round_s` is the last round: in FLARE's first its
trainers still start. The sides run one after the other, so that only an idle machine compares them fairly.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.common import keep
from benchmarks.sites import ROOT, TEAMS, connected, federated
from fedllm.runtime.store import read_events
from fedllm.silo.docstrings import docstring_rows
from fedllm.silo.models import load_tokenizer
from fedllm.silo.smollm2 import smollm2_folder
from fedllm.silo.sources import Row, hold_out
from fedllm.silo.templates import Turn, render

ROUNDS, TRAIN, TEST, TOKENS = 2, 32, 20, 128

MISSING = """\
FLARE's example is not there; `git clone https://github.com/NVIDIA/NVFlare`, then `python -m venv VENV && VENV/bin/pip \
install nvflare transformers peft datasets trl tensorboard bitsandbytes`; nothing was measured."""

ON_PROCESSOR = {r"device_map = \{.*\}": "device_map = None", r"\bbf16=True": "bf16=True, use_cpu=True"}
"""What is changed in the example's client, as patterns that must be found once."""

SHARED = ["threads=1", "runtime=local", "evaluate.alone=false", f"rounds={ROUNDS}", f"task.max_tokens={TOKENS}"]
SHARED += [f"data.limit_train={TRAIN}", f"data.limit_test={TEST}"]

AS_FLARE = ["name=as-flare", "dtype=bfloat16", "gradient_checkpointing=true"]
AS_FLARE += ["trainable.r=64", "trainable.dropout=0.1", 'trainable.target_modules=["q_proj", "v_proj"]']
AS_FLARE += ["client.steps=1", f"client.batch_size={TRAIN}", "client.micro_batch=4", "client.learning_rate=5e-4"]
AS_FLARE += ["client.max_grad_norm=0.3", "client.keep_optimiser=true"]


def write_rows(place: Path) -> None:
    """Write the rows that the quickstart's sites use, in the columns of the example."""
    tokenizer = load_tokenizer("smollm2-135m-instruct")

    def cut(row: Row) -> dict[str, str]:
        words = row["response"].split()
        while True:
            turns = [Turn("user", row["prompt"]), Turn("assistant", " ".join(words))]
            text = "".join(piece for piece, _ in render(tokenizer, turns, chat=True))
            if len(words) <= 1 or len(tokenizer(text)["input_ids"]) <= TOKENS:
                return {"input": row["prompt"], "output": turns[1].content}
            words.pop()

    for name in TEAMS:
        train, test = hold_out(docstring_rows(name), 0.1)
        (place / name).mkdir(parents=True)
        for part, rows in (("training", train[:TRAIN]), ("validation", test[:TEST])):
            (place / name / f"{part}.jsonl").write_text("".join(json.dumps(cut(row)) + "\n" for row in rows))


def flare(example: Path, python: Path, place: Path) -> dict[str, float | None]:
    """Measure the example."""
    shutil.copytree(example, place / "example")
    client = place / "example" / "client.py"
    for pattern, new in ON_PROCESSOR.items():
        text, found = re.subn(pattern, new, client.read_text())
        assert found == 1, f"the example's client.py has {pattern!r} {found} times; take another commit of NVFlare"
        client.write_text(text)
    write_rows(place / "rows")
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    env |= {"PATH": f"{python.parent}{os.pathsep}{env['PATH']}", "HF_HOME": str(place / "home"), "HF_HUB_OFFLINE": "1"}
    # One GPU a site, which need not be there: so all sites work at the same time.
    said = ["job.py", "--gpu", "[0],[1],[2],[3]", "--ports", *map(str, range(7777, 7781)), "--client_ids", *TEAMS]
    said += ["--train_mode", "PEFT", "--num_rounds", str(ROUNDS), "--model_name_or_path", str(smollm2_folder())]
    said += ["--data_path", str(place / "rows"), "--workspace_dir", str(place / "work")]
    begun = time.perf_counter()
    with (place / "flare.log").open("wb") as log:
        subprocess.run([python, *said], cwd=client.parent, env=env, stdout=log, stderr=log, timeout=1800)
    total = time.perf_counter() - begun
    server = place / "work" / "llm_hf_peft" / "server"
    marks = times(server / "log.json")
    if len(marks) != ROUNDS + 1:
        print((place / "flare.log").read_text()[-4000:], file=sys.stderr)
        raise SystemExit("FLARE's example did not end its rounds; the end of its log is above")
    sizes = server / "pool_stats" / "simulator_cell_stats.json"
    sent = json.loads(sizes.read_text()) if sizes.exists() else {}
    return {
        "total_s": round(total, 1),
        "round_s": round(marks[-1] - marks[-2], 1),
        "bytes_down": bytes_of(sent.get("sent_msg_sizes@server.simulate_job")),
        "bytes_up": bytes_of(sent.get("received_msg_sizes@server.simulate_job")),
    }


def times(log: Path) -> list[float]:
    """Return when each round began, and when the last ended."""
    lines = map(json.loads, log.read_text().splitlines() if log.exists() else [])
    marks = [line["asctime"] for line in lines if re.search(r"Round \d+ started|Finished FedAvg", line["message"])]
    return [datetime.strptime(mark, "%Y-%m-%d %H:%M:%S,%f").timestamp() for mark in marks]


def bytes_of(pool: Any) -> int | None:
    """Return the bytes a round of a histogram of messages in MiB."""
    kinds = pool["pool"]["cat_data"].values() if pool else []
    return round(sum(each["total"] for kind in kinds for each in kind if each) * 2**20 / ROUNDS) or None


def ours(folder: Path, name: str, settings: Sequence[str]) -> dict[str, float]:
    """Measure this project over the sites that are connected."""
    begun = time.perf_counter()
    federated(folder, [*SHARED, *settings])
    total = time.perf_counter() - begun
    last = [event for event in read_events(folder.parent / "runs" / name) if event["event"] == "round"][-1]
    return {
        "total_s": round(total, 1),
        "round_s": round(sum(last["seconds"].values()), 1),
        "bytes_down": last["bytes_down"],
        "bytes_up": last["bytes_up"],
    }


def main(
    example: Annotated[Path, typer.Option(help="The folder of FLARE's example.")] = Path("llm_hf"),
    python: Annotated[Path, typer.Option(help="A python with what the example asks for.")] = Path("VENV/bin/python"),
) -> None:
    """Measure both and keep what came out."""
    if not (example / "job.py").exists() or not python.exists():
        print(MISSING)
        sys.exit(0)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    with tempfile.TemporaryDirectory(prefix="fedllm-flare-") as name:
        place = Path(name)
        found: dict[str, Any] = {"flare_lora": flare(example, python.absolute(), place)}
        print(json.dumps(found), flush=True)
        begun = time.perf_counter()
        with connected(place) as folder:
            start = time.perf_counter() - begun
            found["ours"] = ours(folder, "as-flare", AS_FLARE)
            found["quickstart"] = ours(folder, "quickstart", [])
    told = {f"{side}_{key}": value for side, values in found.items() for key, value in values.items()}
    keep("reference_flare_lora", {**told, "ours_total_with_start_s": round(start + told["ours_total_s"], 1)})


if __name__ == "__main__":
    typer.run(main)
