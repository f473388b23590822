"""Sites that do no work, for measuring what carries the work: `start` is a site whose worker sends back what it got."""

from __future__ import annotations

import json
import shutil
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

ROUNDS, REPEATS = 20, 5


def work() -> None:
    """Answer every request with the bytes of its own tensors, under a head that says whose reply it is."""
    for line in sys.stdin:
        asked = json.loads(line)
        head = asked["head"]
        with Path(asked["request"]).open("rb") as source, Path(asked["reply"]).open("wb") as target:
            listed = json.loads(source.read(int.from_bytes(source.read(8), "little")))
            told = {"client": head["client"], "round": head["round"], "weight": 1.0, "scalars": {}}
            listed["__metadata__"]["fedllm"] = json.dumps(json.loads(listed["__metadata__"]["fedllm"]) | told)
            text = json.dumps(listed).encode()
            text += b" " * (-len(text) % 8)
            target.write(len(text).to_bytes(8, "little") + text)
            shutil.copyfileobj(source, target, 1 << 20)
        print(json.dumps({"done": True}), flush=True)


def start(name: str, folder: Path) -> None:
    """Serve a site whose worker is `work`."""
    from fedllm.app.site import known
    from fedllm.federation.site.daemon import start as serve
    from fedllm.federation.site.desk import Desk
    from fedllm.federation.site.policy import read_site

    site = read_site(folder / "site.toml", known())
    with Desk(site, [sys.executable, "-m", "benchmarks.echo", "work"], known()) as desk:
        serve(name, Path(site.kit), Path(site.state), desk.answer)


def loop(folder: Path, line: Any, expected: Sequence[str]) -> None:
    """Measure at the server, in the engine's own process: empty rounds, then 100 and 500 MB each way."""
    import torch

    from fedllm.core.types import Request
    from fedllm.runtime.remote import remote

    begun, told = time.time(), dict[str, Any]()
    question = json.loads((folder / "question.json").read_text())
    for site in expected:
        answer, _ = line.call(site, {"do": "ask", **question, "run": folder.name}, b"", 10)
        assert answer.get("allowed"), answer
    traffic: dict[str, Mapping[str, Any]] = {}
    exchange = remote(
        line,
        folder / "spool",
        run=folder.name,
        largest=1 << 30,
        note=lambda site, why: print(site, why, file=sys.stderr),
        progress=lambda site, what: traffic.update({site: what}),
    )
    number = 0

    def a_round(tensors: Mapping[str, torch.Tensor]) -> float:
        nonlocal number
        number, begun, answered = number + 1, time.perf_counter(), 0
        for reply in exchange([Request(site, number, "evaluate", tensors) for site in expected]):
            answered += 1
            assert reply.tensors.keys() == tensors.keys()
            # All of the first replies is compared, of the others a tensor.
            names = list(tensors) if number <= 2 else list(tensors)[:1]
            assert all(torch.equal(reply.tensors[name], tensors[name]) for name in names)
            del reply
        assert answered == len(expected), answered
        return time.perf_counter() - begun

    first = a_round({})
    told["empty"] = [a_round({"x": torch.full((1,), float(n))}) for n in range(ROUNDS)]
    idle = resident()
    for megabytes in (100, 500):
        count = megabytes * 10**6 // 2 // 8
        tensors = {f"layer.{n}": torch.full((count,), n, dtype=torch.bfloat16) for n in range(8)}
        with Peak() as peak:
            seconds = []
            for repeat in range(REPEATS):
                tensors["layer.0"][0] = repeat + 1
                seconds.append(a_round(dict(tensors)))
        told[str(megabytes)] = {"seconds": seconds, "peak_mb": peak.most / 2**20}
        del tensors
    told |= {"first": first, "begun": begun, "idle_mb": idle / 2**20, "traffic": traffic}
    (folder / "told.json").write_text(json.dumps(told))


def resident() -> int:
    """Return the bytes of memory of this process."""
    import psutil

    return int(psutil.Process().memory_info().rss)


class Peak:
    """The most memory that this process had while it was looked at."""

    def __enter__(self) -> Peak:
        self.most, self._over = resident(), threading.Event()
        self._look = threading.Thread(target=self._watch, daemon=True)
        self._look.start()
        return self

    def _watch(self) -> None:
        while not self._over.wait(0.02):
            self.most = max(self.most, resident())

    def __exit__(self, *problem: object) -> None:
        self._over.set()


def serve_with_loop(folder: Path, alone: bool) -> None:
    """Serve a federation whose runs are `loop`; `alone`: they call their sites by the engine alone."""
    from fedllm.federation.server import serve

    if alone:
        serve.DIRECT = "benchmarks.echo:loop"
    serve.serve(folder, "benchmarks.echo:loop")


if __name__ == "__main__":
    if sys.argv[1] == "work":
        work()
    elif sys.argv[1] in ("serve", "alone"):
        serve_with_loop(Path(sys.argv[2]), sys.argv[1] == "alone")
    else:
        start(sys.argv[2], Path(sys.argv[3]))
