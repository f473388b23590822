"""A process for tests that says who it is and never ends."""

import os
import sys
import time

if __name__ == "__main__":
    print(os.getpid(), *sys.argv[1:], sep="|", flush=True)
    while True:
        time.sleep(60)
