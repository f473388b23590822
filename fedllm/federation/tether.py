"""Run a module in a process that dies with the one that started it: `python tether.py PARENT MODULE ARGUMENTS...`.

FLARE's job processes look whether their parent lives, and then ask themselves to stop. One that is still starting does
not hear it: it says again and again, without a pause and for ever, that it cannot reach its parent.
"""

import os
import runpy
import sys
import threading
import time

LOOK = 0.5


def watch(parent: int) -> None:
    """End this process as soon as its parent is another one than that which started it."""
    while os.getppid() == parent:
        time.sleep(LOOK)
    # Nothing is lost: every attempt may be killed at any instant.
    os._exit(1)


if __name__ == "__main__":
    parent, module, *arguments = sys.argv[1:]
    threading.Thread(target=watch, args=(int(parent),), daemon=True).start()
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)
