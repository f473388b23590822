"""What goes wrong on real machines: clocks, full disks, other versions, other weights, a terminal that is closed."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

import fedllm
from benchmarks.sites import FEDLLM
from fedllm.federation.site.audit import verify
from fedllm.runtime.store import read_events
from tests.integration.test_two_machines import SITES, adapter, on_one_machine, prepare
from tests.loopback import Loopback, loopback
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
pytest.importorskip("nvflare", reason="the extra fedllm[federation] is not installed")

DAY = 86_400

CLOCK = r"""
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdlib.h>
#include <sys/time.h>
#include <time.h>
static long wrong(void) { const char *by = getenv("WRONG_BY"); return by ? atol(by) : 0; }
int clock_gettime(clockid_t which, struct timespec *at) {
    static int (*real)(clockid_t, struct timespec *);
    if (!real) real = dlsym(RTLD_NEXT, "clock_gettime");
    int failed = real(which, at);
    if (!failed && (which == CLOCK_REALTIME || which == CLOCK_REALTIME_COARSE)) at->tv_sec += wrong();
    return failed;
}
time_t time(time_t *at) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    if (at) *at = now.tv_sec;
    return now.tv_sec;
}
int gettimeofday(struct timeval *restrict at, void *restrict zone) {
    struct timespec now;
    clock_gettime(CLOCK_REALTIME, &now);
    at->tv_sec = now.tv_sec;
    at->tv_usec = now.tv_nsec / 1000;
    return 0;
}
"""


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def clock(place):
    """Return by what environment a process has a clock that is wrong by so many seconds."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if not compiler or not sys.platform.startswith("linux"):
        pytest.skip("a wrong clock needs Linux and a C compiler")
    (place / "clock.c").write_text(CLOCK)
    subprocess.run(
        [compiler, "-shared", "-fPIC", "-O1", "-o", place / "clock.so", place / "clock.c", "-ldl"], check=True
    )
    return lambda seconds: {"LD_PRELOAD": str(place / "clock.so"), "WRONG_BY": str(seconds)}


def test_clocks_that_are_a_day_apart_change_nothing(tmp_path):
    prepare(tmp_path)
    wrong = clock(tmp_path)
    told = subprocess.run(
        [sys.executable, "-c", "import time; print(time.time())"],
        env={**os.environ, **wrong(DAY)},
        check=True,
        capture_output=True,
    )
    assert float(told.stdout) - time.time() > DAY - 60
    with loopback(tmp_path, world={"a": wrong(DAY), "b": wrong(-DAY)}) as them:
        them.submit("tiny")
        assert them.ends("tiny")["state"] == "done"
        logs = {name: verify(tmp_path / name / "state" / "audit.jsonl").entries[-1]["time"] for name in SITES}
        assert logs["b"] < logs["c"] < logs["a"]
    assert same(adapter(on_one_machine(tmp_path)), adapter(them.folder / "runs" / "tiny"))


@contextmanager
def small(folder, megabytes):
    """Put a folder and what is in it on a disk of its own, so small that it can be filled."""
    kept = folder.with_name(f"{folder.name}.kept")
    if folder.exists():
        folder.rename(kept)
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={megabytes}m,mode=700", "tmpfs", folder])
    if done.returncode:
        pytest.skip("a small disk needs the right to mount one")
    try:
        if kept.exists():
            shutil.copytree(kept, folder, dirs_exist_ok=True)
        yield folder
    finally:
        shutil.copytree(folder, folder.with_name(f"{folder.name}.after"))
        subprocess.run(["umount", "-l", folder], check=True)


def fill(folder):
    """Take all the room of a disk; return the file that has it."""
    path = folder / "filler"
    with path.open("wb", buffering=0) as file:
        for size in (1 << 20, 1 << 12, 1):
            try:
                while True:
                    file.write(bytes(size))
            except OSError:
                pass
    assert shutil.disk_usage(folder).free == 0
    return path


def test_a_full_disk_of_the_server_is_said_and_nothing_is_lost(tmp_path):
    prepare(tmp_path)
    them = Loopback(tmp_path)
    with small(them.folder, 64):
        try:
            them.start()
            them.submit("tiny", "rounds=4")
            them.until("tiny", lambda state: (state["live"] or {}).get("round", 0) >= 1)
            filler = fill(them.folder)
            time.sleep(30)
            status = subprocess.run(
                [*FEDLLM, "federation", "status", "tiny", "--admin", str(them.folder)], capture_output=True, text=True
            )
            print(status.stdout, status.stderr)
            assert "make room there" in status.stdout
            filler.unlink()
            ended = them.ends("tiny")
            print(ended)
            assert ended["state"] == "failed" and "No space left on device" in ended["reason"], ended
            them.ask(do="resume", name="tiny")
            assert them.ends("tiny")["state"] == "done"
            far = adapter(them.folder / "runs" / "tiny")
        finally:
            them.stop()
    rounds = [event for event in read_events(them.folder.with_name("federation.after") / "runs" / "tiny")]
    assert [event["clients"] for event in rounds if event["event"] == "round"] == [3] * 4
    recipe = (tmp_path / "recipe.toml").read_text()
    (tmp_path / "recipe.toml").write_text(recipe.replace("rounds = 2", "rounds = 4"))
    assert same(adapter(on_one_machine(tmp_path)), far)


def test_a_full_disk_of_a_site_leaves_it_out_by_its_reason_until_there_is_room(tmp_path):
    prepare(tmp_path)
    them = Loopback(tmp_path)
    with small(tmp_path / "b" / "state", 16) as disk:
        try:
            them.start()
            them.submit("tiny", "rounds=8", "client.steps=6")
            them.until("tiny", lambda state: (state["live"] or {}).get("round", 0) >= 1)
            filler = fill(disk)
            events = them.folder / "runs" / "tiny"

            def dropped():
                return [
                    event["dropped"] for event in read_events(events) if event["event"] == "round" and event["dropped"]
                ]

            them.until("tiny", lambda state: dropped() or state["state"] == "done")
            print(dropped())
            assert "make room at the site" in dropped()[0]["b"]
            filler.unlink()
            assert them.ends("tiny")["state"] == "done"
            rounds = [event for event in read_events(events) if event["event"] == "round"]
            assert rounds[-1]["clients"] == 3, rounds
        finally:
            them.stop()


def test_a_site_with_another_version_or_other_weights_is_refused_by_name_and_the_others_go_on(tmp_path):
    prepare(tmp_path)
    shutil.copytree(Path(fedllm.__file__).parent, tmp_path / "old" / "fedllm")
    init = tmp_path / "old" / "fedllm" / "__init__.py"
    assert fedllm.__version__ in init.read_text()
    init.write_text(init.read_text().replace(fedllm.__version__, "0.0.9"))
    shutil.copytree(tmp_path / "model", tmp_path / "other")
    tiny_model(seed=7).save_pretrained(tmp_path / "other")
    world = {"b": {"PYTHONPATH": f"{tmp_path / 'old'}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}}
    with loopback(tmp_path, world=world, models={"c": f'{{ path = "{tmp_path / "other"}" }}'}) as them:
        them.submit("tiny", "evaluate.alone=false")
        ended = them.ends("tiny")
        asked = read_events(them.folder / "runs" / "tiny")[0]
        print(ended["live"]["says"], asked)
        assert ended["state"] == "done" and asked["sites"] == ["a"]
        assert "b works with fedllm 0.0, the server with" in asked["refused"]["b"]
        assert "weights" in asked["refused"]["c"]
        for name, rule in (("b", "version"), ("c", "model")):
            log = verify(tmp_path / name / "state" / "audit.jsonl").entries
            assert rule in next(entry["rule"] for entry in log if entry["what"] == "refuse")
            assert not [entry for entry in log if entry["what"] in ("begin", "reply")]


def test_a_run_that_is_stopped_within_a_round_loses_no_reply_and_goes_on_to_the_same_bits(tmp_path):
    prepare(tmp_path)
    more = ["rounds=4", "client.steps=200"]
    with loopback(tmp_path) as them:
        them.submit("tiny", *more)
        for number in (1, 2):
            them.until(
                "tiny",
                lambda state, number=number: any(
                    told.get("state") == "working" and told.get("round") == number
                    for told in (state["live"] or {}).get("sites", {}).values()
                ),
            )
            assert them.ask(do="stop", name="tiny")["state"] == "running"
            assert them.ends("tiny")["state"] == "stopped", them.state("tiny")
            them.ask(do="resume", name="tiny")
        assert them.ends("tiny")["state"] == "done"
        far = them.folder / "runs" / "tiny"
        assert [event["clients"] for event in read_events(far) if event["event"] == "round"] == [3] * 4
        recipe = (tmp_path / "recipe.toml").read_text()
        recipe = recipe.replace("rounds = 2", "rounds = 4").replace("steps = 2", "steps = 200")
        (tmp_path / "recipe.toml").write_text(recipe)
        assert same(adapter(on_one_machine(tmp_path)), adapter(far))


def test_ctrl_c_leaves_a_run_running_and_attach_comes_back_to_it(tmp_path):
    prepare(tmp_path)
    with loopback(tmp_path) as them:
        admin = ["--admin", str(them.folder / "admin")]
        command = [*FEDLLM, "federation", "run", str(tmp_path / "recipe.toml"), *admin]
        terminal = subprocess.Popen(
            command,
            cwd=tmp_path,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            # Tests that run in the background have been told to overhear it.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        until = time.monotonic() + 300
        while "tiny" not in them.ask(do="status")["runs"]:
            assert time.monotonic() < until
            time.sleep(0.2)
        time.sleep(2)
        terminal.send_signal(signal.SIGINT)
        try:
            printed, problem = terminal.communicate(timeout=300)
        finally:
            terminal.kill()
        assert terminal.returncode == 0 and not problem, problem
        assert "tiny goes on without you" in printed
        assert them.state("tiny")["state"] not in ("done", "failed", "stopped")
        back = subprocess.run(
            [*FEDLLM, "federation", "attach", "tiny", *admin], cwd=tmp_path, capture_output=True, text=True, timeout=600
        )
        assert back.returncode == 0 and "tiny is done." in back.stdout, back
        assert (tmp_path / "runs" / "tiny" / "adapter").exists()
