"""What a site allows of one piece of work, given what it has done before: each round once, and so much a day."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from fedllm.core.types import Request
from fedllm.federation.site.audit import Entry
from fedllm.federation.site.bench import Job
from fedllm.federation.site.policy import Site
from fedllm.federation.site.record import ONCE, TRAIN, done_once
from fedllm.federation.site.rules import Denied


def once(folder: Path, name: str, request: Request, rounds: int, running: Iterable[Job]) -> None:
    """Deny a round that the run has not, or in which this was or is being done for another request.

    Raises:
        Denied: by the rule `ask` or `once`.
    """
    if request.op not in ONCE:
        return
    if request.round >= rounds:
        raise Denied("ask", f"This run was asked for with {rounds} rounds; round {request.round + 1} is none of them.")
    done, what = done_once(folder, request.op, request.round), "trained" if request.op == TRAIN else "added up"
    if done and done.request == name:
        raise Denied("once", f"Round {request.round + 1} was done here, and its reply is no longer kept.")
    others = [job for job in running if (job.request.op, job.request.round) == (request.op, request.round)]
    if done or any(job.name != name for job in others):
        raise Denied(
            "once", f"Round {request.round + 1} is {what} here once, and it was or is being done for another request."
        )


def today(site: Site, entries: Sequence[Entry], run: str, request: Request) -> None:
    """Deny what is more than the site allows within 24 hours; `entries` are the audit log's of that time.

    A round that is begun again counts once. Tokens count as they are read, also those of work that failed.

    Raises:
        Denied: by the rule `rounds_a_day` or `tokens_a_day`.
    """
    policy = site.policy
    begun = {(each["run"], each["round"]) for each in entries if each["what"] == "begin" and each["op"] == TRAIN}
    if policy.rounds_a_day is not None and request.op == TRAIN:
        count = len(begun - {(run, request.round)})
        if count >= policy.rounds_a_day:
            raise Denied(
                "rounds_a_day",
                f"{site.name} trains {policy.rounds_a_day} rounds within 24 hours, and {count} have begun; try later.",
            )
    tokens = sum(each.get("tokens", 0) for each in entries if each["what"] in ("reply", "failed"))
    if policy.tokens_a_day is not None and tokens >= policy.tokens_a_day:
        raise Denied(
            "tokens_a_day",
            f"{site.name} reads {policy.tokens_a_day} tokens within 24 hours, and {tokens} were read; try later.",
        )
