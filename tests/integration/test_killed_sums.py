"""Killed with -9 within a round, a run with secure sums and a replay that forgets go on with the same bits."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fedllm.app.progress import Ui
from fedllm.app.run import resume, run
from fedllm.app.unlearn import Wish, unlearn
from fedllm.runtime.store import read_events
from tests.integration.test_resume import HEAVY, place, recipe  # noqa: F401


class Deadly(Ui):
    """Kills its own process at one of its steps."""

    def __init__(self, at: int) -> None:
        super().__init__(None)
        self.left = at

    def tick(self, tokens: int) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)
        super().tick(tokens)


def table(place: Path) -> dict[str, Any]:  # noqa: F811
    small = {"rounds": 3, "client": {"steps": 2, "batch_size": 2}, "select": {"name": "everyone"}}
    return {**recipe(place), **small, "evaluate": {"alone": False}, "keep": {"checkpoints": 0}}


def secure(place: Path, folder: Path, at: int | None) -> None:  # noqa: F811
    ui = Deadly(at) if at else None
    summed = {"transforms": [{"name": "clip", "max_norm": 0.2}], "secure": {"drop_outs": 0}}
    if (folder / "recipe.toml").exists():
        resume(folder, ui)
    else:
        run({**table(place), **summed}, folder, ui=ui, secret=b"k" * 32)


def forgetting(place: Path, folder: Path, at: int | None) -> None:  # noqa: F811
    unlearn(place / "old", Wish("c"), folder, Deadly(at) if at else None)


def whole(folder: Path) -> dict[str, Any]:
    """All that must be the same bits: the adapter, and the rounds without their seconds."""
    rounds = [event for event in read_events(folder) if event["event"] == "round"]
    return {
        "adapter": (folder / "adapter" / "adapter_model.safetensors").read_bytes(),
        "rounds": [{key: value for key, value in event.items() if key != "seconds"} for event in rounds],
    }


def process(work: Callable[..., None], place: Path, folder: Path, at: int | None) -> int | None:  # noqa: F811
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(HEAVY)
    made = context.Process(target=work, args=(place, folder, at))
    made.start()
    made.join(300)
    return made.exitcode


@pytest.mark.parametrize(("work", "kills"), [(secure, (3, 9)), (forgetting, (2, 5))], ids=["sums", "forgetting"])
def test_killed_within_rounds_it_goes_on_with_the_same_bits(place, work, kills):  # noqa: F811
    if work is forgetting:
        run(table(place), place / "old")
    assert process(work, place, place / "straight", None) == 0
    for at in kills:
        assert process(work, place, place / "killed", at) == -signal.SIGKILL
        assert "done" not in {event["event"] for event in read_events(place / "killed")}
    assert process(work, place, place / "killed", None) == 0
    assert whole(place / "killed") == whole(place / "straight")
