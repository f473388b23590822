"""The guard of a site's worker: whatever happens to the worker is one failed request, and the next one is done."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import psutil
import pytest

from fedllm.federation.site.guard import Failed, Guard
from tests.desks import WORKER

LINUX = pytest.mark.skipif(sys.platform != "linux", reason="only Linux ends a child with its parent")


@pytest.fixture
def guard(tmp_path):
    guard = Guard(WORKER, tmp_path / "log", {"FEDLLM_SITE": "site.toml"})
    yield guard
    guard.close()


def work(guard, folder, progress=lambda said: None, stop=None, **scalars):
    reply = folder / "reply"
    asked = {"head": {"client": "a", "round": 0, "op": "train", "scalars": scalars}, "memory": None}
    guard.work({**asked, "reply": str(reply)}, progress, stop or threading.Event())
    return reply.read_bytes()


def test_a_worker_does_what_it_is_asked_tells_how_far_it_is_and_stays(guard, tmp_path):
    told = []
    first = work(guard, tmp_path, told.append, tokens=7)
    assert work(guard, tmp_path, tokens=7) == first  # With its process number in it.
    assert told == [{"step": 1, "steps": 2, "seconds": 0.5, "tokens": 7, "text": "a patient's name"}]
    assert (tmp_path / "log").read_text() == "awake site.toml\n"


@pytest.mark.parametrize(
    ("scalars", "sentence"),
    [
        ({"die": 1}, r"died \(signal 9\)"),
        ({"exit": 3}, r"ended \(exit code 3\)"),
        ({"exit": 0}, r"ended \(exit code 0\)"),
        ({"garbage": 1}, "not an answer"),
        ({"endless": 1}, "not an answer"),
        ({"fail": 1}, "no column 'prompt'"),
        ({"die": 1, "leave_a_child": 1}, r"died \(signal 9\)"),
    ],
)
def test_a_failure_is_one_sentence_at_once_and_the_next_request_is_done(guard, tmp_path, scalars, sentence):
    work(guard, tmp_path)
    begun = time.monotonic()
    with pytest.raises(Failed, match=sentence):
        work(guard, tmp_path, **scalars)
    assert time.monotonic() - begun < 5
    assert work(guard, tmp_path)


def test_a_worker_that_says_that_it_failed_stays(guard, tmp_path):
    first = work(guard, tmp_path)
    with pytest.raises(Failed):
        work(guard, tmp_path, fail=1)
    assert work(guard, tmp_path) == first


def test_kill_9_from_outside_is_noticed_at_work_and_between(guard, tmp_path):
    first = work(guard, tmp_path)
    pid = guard._child.pid
    threading.Timer(0.1, os.kill, (pid, signal.SIGKILL)).start()
    begun = time.monotonic()
    with pytest.raises(Failed, match="signal 9"):
        work(guard, tmp_path, slow=30)
    assert 0.09 < time.monotonic() - begun < 5
    second = work(guard, tmp_path)
    os.kill(guard._child.pid, signal.SIGKILL)
    while guard._child.poll() is None:
        time.sleep(0.001)
    third = work(guard, tmp_path)
    assert len({first, second, third}) == 3


def test_a_stop_ends_the_worker_and_not_the_next_one(guard, tmp_path):
    stop = threading.Event()
    threading.Timer(0.1, stop.set).start()
    begun = time.monotonic()
    with pytest.raises(Failed, match="stopped"):
        work(guard, tmp_path, stop=stop, slow=30)
    assert time.monotonic() - begun < 5
    assert work(guard, tmp_path)


def test_what_fails_while_progress_is_heard_does_not_spoil_the_next_answer(guard, tmp_path):
    with pytest.raises(KeyError):
        work(guard, tmp_path, lambda said: {}["no"])
    assert work(guard, tmp_path)


def test_closing_ends_the_worker(guard, tmp_path):
    work(guard, tmp_path)
    child = psutil.Process(guard._child.pid)
    guard.close()
    assert not child.is_running()


def test_a_command_that_is_not_there_is_a_failure(tmp_path):
    with pytest.raises(Failed, match="exit code 1"):
        work(Guard(["/no/such/worker"], tmp_path / "log"), tmp_path)
    assert "No such file" in (tmp_path / "log").read_text()


@LINUX
def test_no_worker_is_left_behind_by_a_daemon_that_is_killed(tmp_path):
    code = (
        "import sys, threading\nfrom pathlib import Path\nfrom fedllm.federation.site.guard import Guard\n"
        "guard = Guard(sys.argv[2:], Path(sys.argv[1], 'log'))\n"
        "guard.start()\nprint(guard._child.pid, flush=True)\nthreading.Event().wait()\n"
    )
    daemon = subprocess.Popen([sys.executable, "-c", code, tmp_path, *WORKER], stdout=subprocess.PIPE, text=True)
    worker = psutil.Process(int(daemon.stdout.readline()))
    while not (tmp_path / "log").read_text():
        time.sleep(0.01)
    daemon.kill()
    daemon.wait()
    daemon.stdout.close()
    psutil.wait_procs([worker], timeout=2)
    assert not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE
