"""What prompts learned together buy: soft, black-box and text prompts, their bytes, their speed, and the endpoint.

    python -m benchmarks.prompts [--data FOLDER] [--only PART] [--again]

FOLDER has `polarity/train.jsonl.gz`, `polarity/test.jsonl.gz` and `banking77/train.jsonl.gz`. Each part is a file in
`benchmarks/results/prompts`, so that what is there is not measured again (but with --again), and what was begun goes
on. The goals: a soft prompt is right on 78 % of polarity's test and 4 points over the mean of the silos alone, with at
most 50 KB a round and silo; a black-box one on 74 %, with 4 KB; a text one on 72 %; scores of candidates 3 times as
fast as one by one; and the same from the served endpoint, to 1e-3. Intents have no goal: each silo's share of right
answers is told, alone and together.
"""

from __future__ import annotations

import argparse
import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from benchmarks.common import RESULTS, keep, machine

PARTS = {
    "soft": ("benchmarks.prompts_soft", "soft"),
    "intents": ("benchmarks.prompts_intents", "intents"),
    "black_box_text": ("benchmarks.prompts_blackbox", "black_box_text"),
    "black_box_soft": ("benchmarks.prompts_blackbox", "black_box_soft"),
    "speed": ("benchmarks.prompts_blackbox", "scoring_speed"),
    "endpoint": ("benchmarks.prompts_endpoint", "endpoint_error"),
}
"""The function that measures each part; it takes `data` (the folder) and `folder` (its own) where it needs them."""

METHODS = ("soft", "black_box_soft", "black_box_text")

KEYS = (
    "zero_shot",
    *METHODS,
    *(f"{method}_alone" for method in METHODS),
    "intents",
    "intents_alone",
    "bytes_soft",
    "bytes_black_box",
    "scoring_speedup",
    "endpoint_max_error",
)
"""What the last line has; null where no part that was measured says it."""


def measured(part: str, data: Path, again: bool) -> dict[str, Any]:
    """Return what a part measured, now or before."""
    file = RESULTS / "prompts" / f"{part}.json"
    if file.exists() and not again:
        return dict(json.loads(file.read_text()))
    module, name = PARTS[part]
    function = getattr(importlib.import_module(module), name)
    offered = {"data": data, "folder": RESULTS.parents[1] / "runs" / f"prompts_{part}"}
    known = inspect.signature(function).parameters
    found = function(**{key: value for key, value in offered.items() if key in known})
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps({"machine": machine(), **found}, indent=1) + "\n")
    return dict(found)


def whole(found: Mapping[str, Mapping[str, Any]], missing: Mapping[str, str]) -> dict[str, Any]:
    """Put the parts together, with null for what is missing and why."""
    told = {key: next((part[key] for part in found.values() if key in part), None) for key in KEYS}
    return {**told, "missing": dict(missing)}


def main() -> None:
    asked = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    asked.add_argument("--data", type=Path, default=RESULTS.parents[2] / "shared" / "data")
    asked.add_argument("--only", choices=PARTS, help="measure only this part; the others as they are kept")
    asked.add_argument("--again", action="store_true", help="measure what is kept again")
    given = asked.parse_args()
    found: dict[str, dict[str, Any]] = {}
    missing: dict[str, str] = {}
    for part in PARTS:
        wanted = given.only in (None, part)
        if not wanted and not (RESULTS / "prompts" / f"{part}.json").exists():
            missing[part] = "not measured yet"
            continue
        try:
            found[part] = measured(part, given.data, given.again and wanted)
        except ModuleNotFoundError as error:
            missing[part] = f"no module {error.name}"
            continue
        print(f"{part}: {json.dumps(found[part])}", flush=True)
    keep("prompts", whole(found, missing))


if __name__ == "__main__":
    main()
