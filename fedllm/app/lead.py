"""The server's half of a run between machines: ask the sites, then the same rounds as on one machine."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import fedllm
from fedllm.app.build import Parts, build
from fedllm.app.config import Recipe, Without, read_recipe, read_toml, write_recipe
from fedllm.app.duplicates import between
from fedllm.app.lean import lean
from fedllm.app.live import Lines, Live
from fedllm.app.privacy import has_secret, is_private, keeps_losses, resolved
from fedllm.app.run import go
from fedllm.app.scores import check_files
from fedllm.app.stages import Nodes, with_skipped
from fedllm.core.errors import FedllmError
from fedllm.core.types import Request, Scalars
from fedllm.runtime.line import Line, Unreachable
from fedllm.runtime.remote import remote
from fedllm.runtime.secret import secret_in
from fedllm.runtime.store import append_event, locked, read_events, trim_events, write_text
from fedllm.runtime.wire import message_bytes
from fedllm.silo.models import weights_sha256

ANSWER_BYTES = 1 << 16
"""The most that a reply without tensors takes, and the head of one with them."""


FINGERPRINT_BYTES = 1 << 30
"""The most that a site's salted hashes take, of 16 bytes a text."""

MOST_COUNTS = 100
"""Counts of cleaning that are taken from one site."""


def lead(folder: Path, line: Line, expected: Sequence[str]) -> None:
    """Run the recipe in the folder with the sites at the other end of the line; go on from its last checkpoint.

    Who started the run stands in `run.json` beside the recipe.

    Raises:
        FedllmError: what ends the run, in one sentence.
        Aborted: the engine's job ended; the run goes on in the next one.
    """
    recipe = read_recipe(read_toml(folder / "recipe.toml"))
    with locked(folder), Live(folder, recipe.rounds) as live, Lines(live) as ui:
        # A kill may have left half a line, after which nothing could be written.
        trim_events(folder, recipe.rounds)
        check_files(recipe)
        secret = secret_in(folder) if has_secret(recipe) else None
        if is_private(recipe):
            # Sites are told the noise that was solved for, and after a restart it is still that.
            recipe = resolved(recipe, len(expected))
            write_text(folder / "recipe.toml", write_recipe(recipe))
        names = taking_part(folder, recipe, line, expected, live)
        live.say("opening the model")
        parts = lean(build(recipe, elsewhere=names, secret=secret), folder / "spool")
        nodes = reach(folder, parts, line, live)
        go(folder, parts, ui, nodes)


def asked_of(name: str, recipe: Recipe) -> dict[str, Any]:
    """Return what a site is told of a recipe: all but whose text lies where, and what others have forgotten."""
    rows = {site: keys for site, keys in recipe.without.rows.items() if site == name}
    own = recipe.model_copy(update={"without": Without(rows=rows)})
    return own.model_dump(mode="json", exclude_none=True, exclude={"silos", "partition", "federation"})


def question(name: str, recipe: Recipe, weights: str, run: str, user: str) -> dict[str, Any]:
    """Return all that a site is told of a run before it takes part; `weights` is the hash of the base model's."""
    return {
        "run": run,
        "recipe": asked_of(name, recipe),
        "algorithm": [recipe.algorithm["name"]],
        "fedllm": fedllm.__version__,
        "model_sha256": weights,
        "user": user,
    }


def taking_part(folder: Path, recipe: Recipe, line: Line, expected: Sequence[str], live: Live) -> list[str]:
    """Ask every site whether it takes part; return those that did not refuse, the same ones after a restart.

    A site that does not answer now is one of them: it may come back in a later round.
    """
    before = [event for event in read_events(folder) if event["event"] == "asked"]
    names = list(before[0]["sites"]) if before else list(expected)
    user = json.loads((folder / "run.json").read_text(encoding="utf-8"))["user"]
    weights, patience = weights_sha256(recipe.model), recipe.federation.patience

    def said(name: str) -> dict[str, Any]:
        return ask(line, name, {"do": "ask", **question(name, recipe, weights, folder.name, user)}, patience)

    with ThreadPoolExecutor(len(names) or 1) as pool:
        found = pool.map(said, names)
    refused: dict[str, str] = {}
    for name, answer in zip(names, found, strict=True):
        if answer.get("allowed") is False:
            refused[name] = str(answer.get("error"))
            live.say(f"{name} refuses ({answer.get('rule')}): {refused[name]}")
        elif "error" in answer:
            live.say(f"{name}: {answer['error']}")
        live.site(name, {"state": "refused" if name in refused else "failed" if "error" in answer else "in"})
    willing = [name for name in names if name not in refused]
    if len(willing) < recipe.federation.least:
        reasons = "; ".join(f"{name}: {why.rstrip('.')}" for name, why in refused.items())
        raise FedllmError(
            f"{len(willing)} of {len(names)} sites take part and federation.least is {recipe.federation.least} "
            f"({reasons}); change the recipe to what the sites allow."
        )
    if not before:
        append_event(folder, {"event": "asked", "sites": willing, "refused": refused})
        return willing
    return names


def ask(line: Line, name: str, asking: dict[str, Any], patience: float) -> dict[str, Any]:
    """Ask one site, for as long as there is patience with it; one that does not answer has said nothing."""
    since = time.monotonic()
    while True:
        try:
            return line.call(name, asking, b"", 10)[0]
        except Unreachable:
            if time.monotonic() - since > patience:
                return {}
            time.sleep(1)


def reach(folder: Path, parts: Parts, line: Line, live: Live) -> Nodes:
    """Return the nodes of a run whose sites are at the other end of the line, once they have opened their text."""
    recipe, why = parts.recipe, dict[str, str]()
    wire = parts.algorithm.wire(parts.params)
    update = message_bytes(wire, {"names": list(wire)}) + ANSWER_BYTES

    learning = parts.method.ops if parts.method else ("train",)  # What else an average asks for has small answers.

    def note(name: str, sentence: str) -> None:
        why[name] = sentence
        live.say(f"{name}: {sentence}")

    def silent() -> dict[str, str]:
        told = dict(why)
        why.clear()
        return told

    def largest(request: Request) -> int:
        if request.op in learning:
            return update
        return FINGERPRINT_BYTES if request.op == "fingerprints" else ANSWER_BYTES

    def deadline(request: Request) -> float:
        of_round = request.op in (parts.method.ops if parts.method else parts.algorithm.ops)
        return recipe.federation.deadline or math.inf if of_round else math.inf

    exchange = remote(
        line,
        folder / "spool",
        run=folder.name,
        patience=recipe.federation.patience,
        parallel=recipe.federation.parallel,
        deadline=deadline,
        largest=largest,
        note=note,
        progress=live.site,
    )
    started = [event for event in read_events(folder) if event["event"] == "start"]
    if started:
        return Nodes(exchange, {}, started[0]["silos"], silent=silent)
    live.say("each site opens the model and its text")
    if recipe.duplicates and (told := between(folder, recipe, parts.silos.names, exchange, why)):
        live.say(told)
    kinds: tuple[str, ...] = () if keeps_losses(recipe) else ("train", "test")
    held: dict[str, Mapping[str, int]] = {name: dict.fromkeys(kinds, 0) for name in parts.silos.names}
    counts: dict[str, Mapping[str, int]] = {}
    for reply in exchange([Request(name, 0, "open", {}) for name in parts.silos.names]):
        held[reply.client] = {part: int(reply.scalars.get(part, 0)) for part in kinds}
        counts[reply.client] = counted_there(reply.scalars)
        live.say(f"{reply.client} is ready")
    return Nodes(exchange, {}, held, counts, silent)


def counted_there(scalars: Scalars) -> dict[str, int]:
    """Return what cleaning counted at a site, by its own word."""
    told = {key.removeprefix("cleaned."): value for key, value in scalars.items() if key.startswith("cleaned.")}
    sane = {key[:100]: int(value) for key, value in list(told.items())[:MOST_COUNTS] if 0 <= value < 2**53}
    skipped = scalars.get("skipped", 0.0)
    return with_skipped(sane, int(skipped) if 0 <= skipped < 2**53 else 0)
