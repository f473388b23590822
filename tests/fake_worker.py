"""A worker for tests, quick to start: what it does is said by the scalars of the request, and so is what it answers."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path


def say(**line):
    print(json.dumps(line), flush=True)


def message(head, payload=b"\0\0\x80\x3f"):
    """A message of one float, as bytes."""
    header = {"x": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}, "__metadata__": {"fedllm": json.dumps(head)}}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text + payload


def work(asked):
    head, scalars = asked["head"], asked["head"]["scalars"]
    tell = {key: value for key, value in scalars.items() if key in ("tokens", "read", "loss")}
    say(progress={"step": 1, "steps": 2, "seconds": 0.5, "text": "a patient's name", **tell})
    end = time.monotonic() + scalars.get("slow", 0)
    while time.monotonic() < end:
        time.sleep(0.01)
    if "leave_a_child" in scalars:
        subprocess.Popen(["sleep", "60"])
    if "die" in scalars:
        os.kill(os.getpid(), signal.SIGKILL)
    if "exit" in scalars:
        os._exit(int(scalars["exit"]))
    if "garbage" in scalars:
        print("Some weights were not initialised", flush=True)
        time.sleep(60)
    if "endless" in scalars:
        while True:
            sys.stdout.write("x" * 100_000)
    if "fail" in scalars:
        return say(failed="the text has no column 'prompt'")
    count = json.loads(Path(asked["memory"]).read_bytes())["count"] if asked["memory"] else 0
    answer = {"client": head["client"], "round": head["round"] + int(scalars.get("lie", 0)), "weight": 3.0}
    answer["scalars"] = {"train_loss": 2.0, "tokens": scalars.get("tokens", 10), "pid": os.getpid(), "memory": count}
    Path(asked["reply"] + ".memory").write_text(json.dumps({"count": count + 1}))
    if "no_reply" not in scalars:
        Path(asked["reply"]).write_bytes(message(answer) + b"" * int(scalars.get("large", 0)))
    say(done=True)


if __name__ == "__main__":
    print("awake", os.environ.get("FEDLLM_SITE"), file=sys.stderr, flush=True)
    for line in sys.stdin:
        work(json.loads(line))
