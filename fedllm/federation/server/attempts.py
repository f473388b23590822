"""When a run gets a new attempt: a pure function from what is seen to what is done next."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from fedllm.federation import notes

SILENT = 10.0
"""Seconds without a sign of life after which a site is not counted on for a new attempt."""

STEADY = 2.0
"""Seconds that a site has been back before an attempt without it ends for its sake."""

REGROUP = 15.0
"""Seconds that an attempt works before it can end for a site that is back: one that comes and goes costs little."""

QUICK, TRIES = 20.0, 6
"""An attempt that ends within so many seconds and without a round done is a failure; so many in a row end the run."""

STUCK = 90.0
"""Seconds in which the engine must have started an attempt."""

STOPPING = 25.0
"""Seconds that an attempt has to stop by itself."""


class Attempt(NamedTuple):
    """What the server does about a run."""

    state: str = "waiting"
    """waiting, starting, running, stopping, done, failed or stopped."""
    reason: str = ""
    asked: int = 0
    """The user's wish that this is about."""
    number: int = 0
    job: str = ""
    since: float = 0.0
    """When this state began."""
    next_try: float = 0.0
    round: int = 0
    """The round that the attempt began with."""
    failures: int = 0


class Seen(NamedTuple):
    """What is so now."""

    now: float
    wanted: str
    asked: int
    patience: float
    wanted_sites: Sequence[str]
    missing: Sequence[str]
    left_out: Sequence[str]
    """Sites that are connected and wanted, but not in the job that is at work."""
    refused: Sequence[str]
    """Revoked sites that are in the job."""
    working: bool
    """There is a process for the job."""
    pending: bool
    """The engine has the job and has not started it."""
    status: str
    round: int
    end: Mapping[str, Any]
    """How this attempt's loop ended, if it said so."""


def first(run: Path) -> Attempt:
    """Return where a run stands when the server has just started."""
    kept = notes.get(run / "engine.json")
    state = str(kept.get("state", "waiting"))
    settled = state in ("done", "failed", "stopped")
    return Attempt(
        state if settled else "waiting",
        str(kept.get("reason", "")) if settled else "",
        int(kept.get("asked", 0)),
        int(kept.get("attempt", 0)),
    )


def told(attempt: Attempt) -> dict[str, Any]:
    """Return what others may know of it."""
    return {
        "state": attempt.state,
        "reason": attempt.reason,
        "asked": attempt.asked,
        "attempt": attempt.number,
        "job": attempt.job,
    }


def decide(attempt: Attempt, seen: Seen) -> tuple[Attempt, str]:
    """Return where the run stands now, and what is to be done: `submit`, `abort` or nothing."""
    if seen.asked != attempt.asked:
        attempt = attempt._replace(asked=seen.asked, failures=0, next_try=0.0)
        if attempt.state in ("done", "failed", "stopped") and seen.wanted == "run":
            attempt = attempt._replace(state="waiting", reason="", since=seen.now)
    if attempt.job:
        # A loop that has ended is over, though its process takes seconds to leave.
        if not seen.end and (seen.working or seen.pending):
            return at_work(attempt, seen)
        return over(attempt, seen), ""
    if attempt.state in ("done", "failed", "stopped"):
        return attempt, ""
    if seen.wanted == "stop":
        return attempt._replace(state="stopped", reason="", since=seen.now), ""
    return waiting(attempt, seen)


def waiting(attempt: Attempt, seen: Seen) -> tuple[Attempt, str]:
    """Wait for all sites, then for those that there are; then begin."""
    if not attempt.since:
        attempt = attempt._replace(since=seen.now)
    patient = bool(seen.missing) and seen.now - attempt.since < seen.patience
    if seen.now < attempt.next_try:
        return attempt, ""
    if patient or len(seen.missing) == len(seen.wanted_sites):
        return attempt._replace(reason=f"waiting for {', '.join(seen.missing)}"), ""
    begun = attempt._replace(state="starting", reason="", number=attempt.number + 1, since=seen.now, round=seen.round)
    return begun, "submit"


def at_work(attempt: Attempt, seen: Seen) -> tuple[Attempt, str]:
    """Let an attempt work, unless it is not wanted, stuck, or works with the wrong sites."""
    if seen.working and attempt.state == "starting":
        attempt = attempt._replace(state="running")
    if attempt.state == "ending":
        if seen.now - attempt.since > STOPPING:
            return attempt._replace(since=seen.now), "abort"
        return attempt, ""
    if seen.wanted == "stop":
        if attempt.state != "stopping":
            return attempt._replace(state="stopping", since=seen.now), ""
        if seen.now - attempt.since > STOPPING or not seen.working:
            return attempt._replace(since=seen.now), "abort"
        return attempt, ""
    age = seen.now - attempt.since
    if seen.refused:
        return ending(attempt, seen, f"{', '.join(seen.refused)} was revoked")
    if seen.left_out and age > REGROUP:
        return ending(attempt, seen, f"{', '.join(seen.left_out)} came back")
    if not seen.working and age > STUCK:
        return ending(attempt, seen, "the engine did not start it")
    return attempt, ""


def ending(attempt: Attempt, seen: Seen, reason: str) -> tuple[Attempt, str]:
    """End an attempt for a reason that is no failure of its own."""
    return attempt._replace(state="ending", reason=reason, since=seen.now), "abort"


def over(attempt: Attempt, seen: Seen) -> Attempt:
    """Say what an attempt's end means: the run is done, failed or stopped, or there is another attempt."""
    end, reason = str(seen.end.get("state", "")), str(seen.end.get("reason", ""))
    free = attempt._replace(job="", since=seen.now)
    if end in ("done", "failed"):
        return free._replace(state=end, reason=reason)
    if seen.wanted == "stop":
        return free._replace(state="stopped", reason="")
    quick = attempt.state != "ending" and end != "stopped" and seen.round <= attempt.round
    quick = quick and seen.now - attempt.since < QUICK
    failures = attempt.failures + 1 if quick else 0
    why = reason or f"the engine ended the attempt ({seen.status or 'its process died'})"
    if failures >= TRIES:
        return free._replace(state="failed", reason=f"{TRIES} attempts in a row came to nothing; the last: {why}")
    return free._replace(
        state="waiting", reason=why, failures=failures, next_try=seen.now + (min(30.0, 2.0**failures) if quick else 0.5)
    )
