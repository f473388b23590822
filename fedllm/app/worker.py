"""A site's worker: a resident process that holds the model and the site's text and does what is asked of it.

It is told one JSON line a request on its input and answers with JSON lines on its output: progress,
then `done` or `failed`. Replies are files. It outlives rounds and runs, so the model is loaded once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.types import Reply, Request, Silo, Tensors

PROGRESS_SECONDS = 0.25

DROPPED = "dropped.safetensors"
"""In a run's folder: the fingerprints of the texts that other sites keep."""

Say = Callable[[Mapping[str, Any]], None]


class Held(NamedTuple):
    """What the worker holds from one request to the next: a run's recipe and the parts made of it."""

    recipe: str
    parts: Any
    name: str
    whole: Any
    """The site's rows before those were dropped that other sites keep."""


def main() -> None:
    """Work until the input ends."""
    # Whatever a library prints goes to the log; the answers have the real output to themselves.
    answers = os.fdopen(os.dup(sys.stdout.fileno()), "w", buffering=1)
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())

    def say(line: Mapping[str, Any]) -> None:
        print(json.dumps(line), file=answers, flush=True)

    held: Held | None = None
    for line in sys.stdin:
        try:
            held = work(json.loads(line), held, say)
            say({"done": True})
        except (FedllmError, Refused) as error:
            say({"failed": str(error)})
        except Exception as error:
            import traceback

            traceback.print_exc()
            say({"failed": f"the site's worker failed ({type(error).__name__}); its log says where"})


def work(asked: Mapping[str, Any], held: Held | None, say: Say) -> Held:
    """Do one request: read its files, work, write the reply and the memory."""
    from fedllm.federation.site.disk import on_disk
    from fedllm.runtime.spool import load_message, save_message
    from fedllm.runtime.store import replacing
    from fedllm.runtime.wire import reply_head

    folder = Path(asked["run"])
    recipe = (folder / "recipe.json").read_text(encoding="utf-8")
    # What other sites keep is another matter in each run, and so are the keys of a secure sum.
    own = '"duplicates"' in recipe or '"secure"' in recipe
    said = f"{folder}\n{recipe}" if own else recipe
    if held is None or held.recipe != said:
        if held and held.parts.ranks:
            held.parts.ranks.close()
        parts = opened(json.loads(recipe), folder)
        held = Held(said, parts, asked["site"], parts.silos.shards[asked["site"]])
        if (folder / DROPPED).exists():
            drop(held, load_message(folder / DROPPED)[0]["drop"])
    head = asked["head"]
    tensors, _ = load_message(Path(asked["request"]))
    request = Request(head["client"], head["round"], head["op"], tensors, head["scalars"])
    # To be looked at a silo needs only what it keeps of its own, and most keep nothing.
    wanted = asked["memory"] and (request.op != "evaluate" or held.parts.first)
    memory = load_message(Path(asked["memory"]))[0] if wanted else {}
    reply, kept = answer(held, request, memory, ticking(held.parts, request, say))
    if request.op == "drop":
        drop(held, kept["drop"])
        with replacing(folder / DROPPED) as beside:
            save_message(beside, {"drop": kept["drop"]}, {})
    # Whole or not, they are nothing yet: the desk records them, or takes them away.
    if kept and request.op == "train":
        with on_disk(Path("its memory")):
            save_message(Path(asked["reply"] + ".memory"), kept, {})
    with on_disk(Path("its reply")):
        save_message(Path(asked["reply"]), reply.tensors, reply_head(reply))
    return held


def opened(asked: Mapping[str, Any], run: Path) -> Any:
    """Build a run's parts for this site: the recipe as it came, this site's own text, model folder and threads."""
    from fedllm.app.build import build
    from fedllm.app.homomorphic import key_from
    from fedllm.app.site import known, own_recipe
    from fedllm.core.noise import key_of
    from fedllm.federation.site.policy import read_site
    from fedllm.runtime.secret import secret_in
    from fedllm.silo.models import weights_sha256

    recipe = own_recipe(asked["recipe"], Path(os.environ["FEDLLM_SITE"]))
    ours = weights_sha256(recipe.model)
    if asked["model_sha256"] and ours != asked["model_sha256"]:
        raise FedllmError(
            f"This site's weights of the base model ({ours[:12]}) are not those of the server "
            f"({asked['model_sha256'][:12]}); get the same model on both sides."
        )
    site = read_site(Path(os.environ["FEDLLM_SITE"]), known())
    secret = secret_in(Path(site.state))
    if recipe.secure:
        # Masks that come again in another run would take each other off.
        secret = key_of(secret, "run", secret_in(run))
    parts = build(recipe, secret=secret, key=key_from(recipe.homomorphic.key) if recipe.homomorphic else None)
    if parts.endpoint:
        parts.endpoint.check()
        parts.endpoint.purse.keep(run / "spent.json")
    return parts


def answer(held: Held, request: Request, memory: Tensors, tick: Callable[[int], None]) -> tuple[Reply, Tensors]:
    """Do what the request asks, by its `op`."""
    from fedllm.app.privacy import keeps_losses

    parts, name = held.parts, held.name
    silo: Silo = parts.open_silo(tick)(name)._replace(memory=memory)
    if request.op == "open" and keeps_losses(parts.recipe):
        return Reply(name, request.round, {}, 1.0), {}
    if request.op == "open":
        counts = {part: float(len(silo.data[part])) for part in ("train", "test")}
        counts |= {"skipped": float(parts.silos.skipped[name])}
        counts |= {f"cleaned.{what}": float(count) for what, count in parts.silos.shards[name].cleaned.items()}
        return Reply(name, request.round, {}, 1.0, counts), {}
    if request.op in ("fingerprints", "drop"):
        return compared(held, request)
    if request.op in (parts.method.ops if parts.method else parts.algorithm.ops):
        return parts.algorithm.client(request, silo)
    if request.op in ("evaluate", "alone") and keeps_losses(parts.recipe):
        raise FedllmError(f"The server asks for '{request.op}', and by the recipe's [secure] no silo tells its loss.")
    if request.op == "evaluate":
        return parts.evaluator(request, silo)
    if request.op == "alone":
        return alone(parts, request, silo)
    raise FedllmError(f"The server asks for '{request.op}', which this version of fedllm does not know; update it.")


def compared(held: Held, request: Request) -> tuple[Reply, Tensors]:
    """Do the site's half of finding texts that several sites have; nothing but salted hashes leaves."""
    from fedllm.algorithms.duplicates import shared_duplicates
    from fedllm.app.duplicates import texts_of
    from fedllm.exchange.select import everyone
    from fedllm.silo.dedupe import salt_from

    wanted = held.parts.recipe.duplicates
    if wanted is None:
        raise FedllmError("The server asks for fingerprints of texts, and the recipe has no [duplicates].")
    algorithm = shared_duplicates(everyone([held.name]), salt=lambda: salt_from(wanted.salt))
    return algorithm.client(request, texts_of(held.name, held.whole, wanted))


def drop(held: Held, drop_N2: Any) -> None:
    """Let the site's rows be without the texts that other sites keep."""
    from fedllm.app.duplicates import kept
    from fedllm.silo.dedupe import salt_from

    recipe = held.parts.recipe
    salt = salt_from(recipe.duplicates.salt)
    held.parts.silos.replace(held.name, kept(held.name, held.whole, drop_N2, recipe, salt))


def alone(parts: Any, request: Request, silo: Silo) -> tuple[Reply, Tensors]:
    """Train alone for as many steps as in so many rounds, and look at the own held-out text; no tensors leave."""
    from fedllm.app.compare import by_method
    from fedllm.core.tensors import subtract

    if parts.method:
        found = by_method(parts.method, silo, int(request.scalars["rounds"]))
        asked = Request(request.client, 0, "evaluate", found, {"base": 0.0})
        return parts.evaluator(asked, silo)[0]._replace(round=request.round, tensors={}), {}
    steps = int(request.scalars["rounds"]) * parts.work().steps(silo.data)
    learned, kept = parts.work(steps=steps, epochs=None).client(request, silo)
    asked = Request(request.client, 0, "evaluate", subtract(request.tensors, learned.tensors), {"base": 0.0})
    reply, _ = parts.evaluator(asked, silo._replace(memory=kept))
    return reply._replace(round=request.round, tensors={}), {}


def ticking(parts: Any, request: Request, say: Say) -> Callable[[int], None]:
    """Return what hears of every step and says, not too often, how far the work is.

    How much was `read` stays at the site where an update has noise on it and the count of its `tokens` has none, or
    where nothing is told but sums.
    """
    from fedllm.app.privacy import hides_records, trusts_nobody

    begun = told = time.perf_counter()
    step, tokens = 0, 0
    data = parts.silos.examples(parts.silos.names[0])
    per_round = parts.steps(data)
    quiet = hides_records(parts.recipe) or trusts_nobody(parts.recipe) or parts.recipe.secure
    counted = "read" if quiet else "tokens"
    steps = {"train": per_round, "alone": per_round * int(request.scalars.get("rounds", 1))}.get(request.op, 0)

    def tick(count: int) -> None:
        nonlocal told, step, tokens
        step, tokens, now = step + 1, tokens + count, time.perf_counter()
        if now - told >= PROGRESS_SECONDS or step == steps:
            told = now
            say(
                {
                    "progress": {
                        "round": request.round,
                        "op": request.op,
                        "step": step,
                        "steps": steps,
                        counted: tokens,
                        "seconds": round(now - begun, 3),
                    }
                }
            )

    return tick


if __name__ == "__main__":
    main()
