"""Become a command that dies with the process that started this one: `python leash.py PARENT COMMAND...`.

Run as a file of its own, and not between fork and exec of a process with threads, where little is safe.
Where the system has no such leash the command has to end when its input does.
"""

import ctypes
import os
import signal
import sys

PR_SET_PDEATHSIG = 1


def main(parent: int, command: list[str]) -> None:
    """Ask Linux for the signal, and see that the parent has not died before it was asked."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            sys.exit("The process that started the worker is gone.")
    os.execvp(command[0], command)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2:])
