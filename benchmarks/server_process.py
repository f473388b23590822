"""What the process that leads a federated run of all weights of SmolLM2-135M holds at most, in float32 models.

    python -m benchmarks.server_process

Two rounds of DiLoCo by two sites, whose desks are in this process too and whose workers are not. Counted is what comes
on top of Python and its libraries; `models_floor` is the parameters, Nesterov's momentum and the largest tensor,
without which the step cannot be taken.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.common import keep
from benchmarks.server_memory import now, peak
from fedllm.app.build import build
from fedllm.app.config import read_recipe, write_recipe
from fedllm.app.lead import lead
from fedllm.app.site import known
from fedllm.federation.server.serve import GIVEN_BACK
from fedllm.federation.site.desk import Desk
from fedllm.federation.site.policy import read_site
from fedllm.runtime.line import Line, decode, encode
from fedllm.silo.models import weights_sha256
from fedllm.silo.trainables import trained

SITES = ["torch", "numpy"]
RECIPE: Mapping[str, Any] = {
    "model": "smollm2-135m-instruct",
    "rounds": 2,
    "threads": 1,
    "device": "cpu",
    "dtype": "float32",
    "task": {"name": "instruct", "max_tokens": 96},
    "trainable": "full",
    "client": {"steps": 1, "batch_size": 1},
    "optimiser": {"name": "nesterov", "learning_rate": 0.7, "momentum": 0.9},
    "evaluate": {"alone": False, "examples": 4},
}


def measure(place: Path) -> dict[str, float]:
    """Lead a run in this process and return the most memory that it took, and the least that it could take."""
    recipe = read_recipe(RECIPE)
    shapes = trained(build(recipe, weights=False, elsewhere=SITES).model)
    model = 4 * sum(value.numel() for value in shapes.values())
    folder = place / "run"
    folder.mkdir()
    (folder / "recipe.toml").write_text(write_recipe(recipe))
    (folder / "run.json").write_text(json.dumps({"wanted": "run", "user": "admin@example.org"}))
    with ExitStack() as stack:
        desks = {name: stack.enter_context(desk(place / name, name)) for name in SITES}

        def call(site: str, head: dict[str, Any], body: bytes, seconds: float) -> tuple[dict[str, Any], Any]:
            return decode(desks[site].answer(encode(head, body)))

        before = now()
        lead(folder, Line(call, lambda: SITES), SITES)
        most = peak()
    return {
        "models_process": round((most - before) / model, 2),
        "models_floor": round(2 + max(4 * value.numel() for value in shapes.values()) / model, 2),
        "beyond_floor_mb": round((most - before - 2 * model - max(4 * v.numel() for v in shapes.values())) / 2**20),
    }


def desk(folder: Path, name: str) -> Desk:
    """Return the desk of a new site, whose text is a library's docstrings."""
    folder.mkdir()
    file = folder / "site.toml"
    file.write_text(f'name = "{name}"\nthreads = 1\n[data]\ntrain = "docstrings:{name}"\n')
    worker: Sequence[str] = [sys.executable, "-m", "fedllm.app.worker"]
    return Desk(read_site(file, known()), worker, known(), weights_sha256, {"FEDLLM_SITE": str(file)})


def main() -> None:
    """Measure in a process of its own, whose C library is told what a server's is told, and keep what came out."""
    if sys.argv[1:]:
        print(json.dumps(measure(Path(sys.argv[1]))))
        return
    with TemporaryDirectory() as place:
        command = [sys.executable, "-m", "benchmarks.server_process", place]
        done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **GIVEN_BACK})
    keep("server_process", json.loads(done.stdout.splitlines()[-1]))


if __name__ == "__main__":
    main()
