"""How FLARE's processes start their job processes here: on a tether, and from folders with any name."""

from __future__ import annotations

import os
import shlex
import sys
from typing import Any

from nvflare.apis.fl_constant import FLContextKey
from nvflare.apis.fl_context import FLContext
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.app_common.job_launcher.process_launcher import ProcessJobLauncher

from fedllm.federation import tether

SECRET = {JobProcessArgs.AUTH_TOKEN, JobProcessArgs.TOKEN_SIGNATURE, JobProcessArgs.SSID}
"""What FLARE passes by the environment, since everybody may read a process's command."""


class Launcher(ProcessJobLauncher):
    """The component; FLARE builds it from the machine's own resources, never from a job."""

    def get_command(self, job_meta: dict[str, Any], fl_ctx: FLContext) -> str:
        """Return the command of a job process; FLARE takes it apart as a shell would."""
        given = dict(fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS))
        _, module = given.pop(JobProcessArgs.EXE_MODULE)
        # FLARE joins the options by spaces itself; what else has spaces is one word.
        options = given.pop(JobProcessArgs.OPTIONS, ("", ""))
        words = [sys.executable, "-P", str(tether.__file__), str(os.getpid()), module]
        for key, (flag, value) in given.items():
            words += [] if key in SECRET else [flag, str(value)]
        return f"{shlex.join(words)} {' '.join(options)}"
