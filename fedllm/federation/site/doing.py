"""One piece of work at a site: from the request's file, by the worker, to a recorded reply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import FedllmError
from fedllm.core.types import NOTHING, Scalars
from fedllm.federation.site import messages, record
from fedllm.federation.site.audit import Audit
from fedllm.federation.site.bench import Job
from fedllm.federation.site.guard import Guard
from fedllm.federation.site.policy import Policy, Site
from fedllm.federation.site.rules import governing

FOUND = ("copied", "personal", "withheld")
"""What a worker counts as it looks its texts through."""


def do(job: Job, folder: Path, site: Site, guard: Guard, audit: Audit) -> None:
    """Do a job, take out of its reply what may not leave, and record it.

    Raises:
        Failed: if the worker did not do it.
        FedllmError: if the reply is too large, or the disk does not take it.
    """
    request, reply = job.request, folder / f".{job.name[:16]}.reply"
    about = {"run": job.run, "round": request.round, "op": request.op, "request": job.name}
    remembers = request.op in (record.TRAIN, record.EVALUATE)
    memory = record.memory_before(folder, request.round) if remembers else None
    logged = False
    try:
        guard.work(
            {
                "run": str(folder),
                "site": site.name,
                "head": {**request._asdict(), "tensors": None, "scalars": dict(request.scalars)},
                "request": str(job.path),
                "memory": memory and str(memory),
                "reply": str(reply),
            },
            job.hear,
            job.stop,
        )
        scalars = messages.reply_scalars(reply, request)
        sent = messages.leave_only(reply, site.policy.metrics, scalars)
        size = reply.stat().st_size
        if size > site.policy.max_message_mb * 1e6:
            raise FedllmError(f"the reply has {size / 1e6:.1f} MB; {site.name} sends {site.policy.max_message_mb:g} MB")
        audit.append(
            "reply",
            **about,
            bytes=size,
            tokens=tokens_read(job, scalars),
            scalars=sent,
            **found_in_texts(scalars),
            rule=", ".join(governing(site)),
        )
        logged = True
        record.keep(folder, request, job.name, reply)
    except Exception as problem:
        audit.append("failed", **about, tokens=0 if logged else tokens_read(job, NOTHING), why=str(problem)[:500])
        raise
    finally:
        reply.unlink(missing_ok=True)
        record.beside(reply, ".memory").unlink(missing_ok=True)


def found_in_texts(scalars: Scalars) -> dict[str, int]:
    """Return what was taken out of the texts of a reply before it came here, as far as there was anything."""
    return {key: int(scalars[key]) for key in FOUND if 0 < scalars.get(key, 0) < math.inf}


def tokens_read(job: Job, scalars: Scalars) -> int:
    """Return the tokens that a job read: what its reply says, or how far it had come."""
    said = (
        job.progress.get("tokens", 0),
        job.progress.get("read", 0),
        scalars.get("tokens", 0),
        scalars.get("scored", 0),
    )
    return int(max(value for value in (0, *said) if math.isfinite(value)))


def progress(job: Job, policy: Policy) -> Mapping[str, Any]:
    """Return how far a job is, without what may not leave."""
    hidden = {"tokens": "tokens", "loss": "train_loss"}
    told = {"step": 0, "steps": 0, "seconds": 0.0, **job.progress}
    shown = {key: told[key] for key in told if key != "read" and hidden.get(key) in (None, *policy.metrics)}
    return {"round": job.request.round, "op": job.request.op, **shown}
