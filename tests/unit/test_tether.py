"""A process on a tether ends with the one that started it; and how FLARE's job processes are put on one."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from fedllm.federation import tether
from tests.flare_parts import lives, until

PARENT = """
import os, subprocess, sys
child = subprocess.Popen([sys.executable, "-P", sys.argv[1], str(os.getpid()), "tests.forever", "a b", "--set"],
                         stdout=sys.stdout, start_new_session=True)
sys.stdin.read()
"""


def test_a_process_ends_when_the_one_that_started_it_is_killed():
    root = str(Path(__file__).parents[2])
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, str(tether.__file__)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        env={**os.environ, "PYTHONPATH": root},
        text=True,
    )
    assert parent.stdin and parent.stdout
    pid, *arguments = parent.stdout.readline().split("|")
    assert arguments == ["a b", "--set\n"]
    assert lives(int(pid))
    parent.kill()
    until(lambda: not lives(int(pid)), 5)
    parent.wait()


def test_a_job_process_is_started_on_a_tether_whatever_its_folder_is_called():
    pytest.importorskip("nvflare")
    from nvflare.apis.fl_constant import FLContextKey
    from nvflare.apis.fl_context import FLContext
    from nvflare.apis.job_launcher_spec import JobProcessArgs

    from fedllm.federation.launch import Launcher

    context = FLContext()
    context.put(
        FLContextKey.JOB_PROCESS_ARGS,
        {
            JobProcessArgs.EXE_MODULE: ("-m", "nvflare.worker"),
            JobProcessArgs.AUTH_TOKEN: ("-t", "secret"),
            JobProcessArgs.WORKSPACE: ("-m", "/srv/our site's #1/kit"),
            JobProcessArgs.OPTIONS: ("--set", "secure_train=true uid=a"),
        },
        private=True,
        sticky=False,
    )
    words = shlex.split(Launcher().get_command({}, context), True)
    assert words[0] == sys.executable and words[2] == str(tether.__file__)
    assert words[4:] == ["nvflare.worker", "-m", "/srv/our site's #1/kit", "--set", "secure_train=true", "uid=a"]
