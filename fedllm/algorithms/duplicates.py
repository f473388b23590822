"""Texts that several silos have, found without showing them: each stays at one silo and is dropped by the others.

A silo sends HMAC-SHA256 of its normalised texts under a salt that the silos share and the server does not know. The
server learns how many different texts each silo has and which silos have how many in common, and nothing of what they
say; each silo learns which of its texts another one has too. If the salt gets out, whoever has the hashes can test
whether a text that it can guess is there: the server must not get it, and a new run should have a new one. The texts
are the silo's own word: one that knows the salt and a text can claim to have it.
"""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable

import torch
from torch import Tensor

from fedllm.core.errors import Refused
from fedllm.core.types import Algorithm, Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.silo.dedupe import fingerprints

LARGEST = 1 << 26
"""Texts of a silo; more in one message is refused."""

STEPS = (Step("silo", "salted hashes of the texts"), Step("server", "tell each silo what another one keeps"))


def shared_duplicates(select: Select, *, salt: Callable[[], bytes]) -> Algorithm:
    """Tell each silo which of its texts to drop; `salt` is called at the silos alone (`dedupe.salt_from`).

    A silo's data are texts by split. What it is to drop is in its memory afterwards as `drop`, for `dedupe.without`.
    """

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        if request.op == "drop":
            drop = request.tensors.get("drop")
            if drop is None or drop.dtype != torch.int64 or drop.dim() != 2 or drop.shape[1] != 2:
                raise Refused("the server says nothing that could be dropped")
            return Reply(request.client, request.round, {}, 1.0), {**silo.memory, "drop": drop}
        each = [fingerprints(texts, salt()) for texts in silo.data.values()]
        prints = torch.unique(torch.cat(each), dim=0)  # sorted: no order tells
        return Reply(request.client, request.round, {"fingerprints": prints}, 1.0), silo.memory

    def server(state: State, exchange: Exchange) -> tuple[State, Report]:
        asked, held, report = list(select(state.round)), dict[str, Tensor](), dict[str, float | str]()
        for reply in exchange([Request(name, state.round, "fingerprints", {}) for name in asked]):
            try:
                held[reply.client] = read_fingerprints(reply, state.round, set(asked) - held.keys())
            except Refused as problem:
                report[f"dropped.{reply.client}"] = str(problem)
        drop = to_drop(held)
        requests = [Request(name, state.round, "drop", {"drop": drop[name]}) for name in asked if name in drop]
        for reply in exchange(requests):
            report[f"shared.{reply.client}"] = len(drop.get(reply.client, ()))
        return state._replace(round=state.round + 1), report

    return Algorithm(lambda params: State(0, dict(params), {}, {}), client, server, None, STEPS)


def to_drop(held: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return what each silo is to drop; who keeps a text is drawn by hash, so that no silo always does."""
    owners: dict[tuple[int, int], list[str]] = defaultdict(list)
    for name, prints in held.items():
        for high, low in prints.tolist():
            owners[high, low].append(name)
    drop: dict[str, list[tuple[int, int]]] = {name: [] for name in held}
    for text, names in owners.items():
        keeper = min(names, key=lambda name: hashlib.blake2b(f"{text} {name}".encode()).digest())
        for name in names:
            if name != keeper:
                drop[name].append(text)
    return {name: torch.tensor(sorted(texts), dtype=torch.int64).view(-1, 2) for name, texts in drop.items()}


def read_fingerprints(reply: Reply, round_number: int, waiting: set[str]) -> Tensor:
    """Return the hashes in a reply, or raise `Refused`; nothing in a reply is trusted."""
    if reply.client not in waiting or reply.round != round_number:
        raise Refused("it was not asked, or has answered already")
    prints = reply.tensors.get("fingerprints")
    if prints is None or len(reply.tensors) != 1 or prints.dtype != torch.int64:
        raise Refused("its reply is not fingerprints")
    if prints.dim() != 2 or prints.shape[1] != 2 or len(prints) > LARGEST:
        raise Refused(f"its fingerprints have shape {tuple(prints.shape)}")
    if len(torch.unique(prints, dim=0)) != len(prints):
        raise Refused("it has a fingerprint twice")
    return prints
