"""What crosses the wire, what of it did not count, and what privacy a run can claim."""

from __future__ import annotations

from collections import Counter
from typing import Any

from fedllm.app.report.data import Run, is_number, part
from fedllm.app.report.words import number, plain, protected, size


def steps(run: Run) -> list[dict[str, Any]]:
    """Return the steps of one round, as planned."""
    found = part(run.start, "plan").get("steps")
    known = [step for step in found if isinstance(step, dict)] if isinstance(found, list) else []
    return [{"where": "", "name": ""} | step for step in known]


def wire(run: Run) -> str:
    """Say how much crosses the wire per silo and round, and whether there was a wire at all."""
    plan = part(run.start, "plan")
    said = []
    if is_number(plan.get("bytes_up")):
        said.append(
            f"Per silo and round: {size(plan.get('bytes_down'))} down and {size(plan['bytes_up'])} up, "
            f"for {number(plan.get('parameters'))} trained parameters."
        )
    if str(run.start.get("runtime")).startswith(("local", "cohort")):
        said.append(
            "All silos of this run were simulated in one process, so nothing crossed a network: "
            "the bytes are those that a federation would send."
        )
    return " ".join(said)


def claim(run: Run) -> str:
    """Say what privacy this run can claim."""
    if part(run.done, "privacy").get("claims") or (run.rounds and run.rounds[-1].get("epsilon")):
        return (
            "What the section on privacy states is guaranteed, and nothing more. The silos' text stays where it is; "
            "where the server adds the noise, it sees each silo's update without any."
        )
    if protected(steps(run)):
        return (
            "What the steps above state about updates is all that is claimed. Where they name no secure or "
            "homomorphic sum, the server sees each silo's update; where they name no noise, there is no "
            "differential privacy."
        )
    return (
        "This run used neither secure aggregation nor differential privacy. The silos' text stays where it "
        "is, but the server sees each silo's update, and updates can reveal something of the text they were "
        "computed from. No privacy guarantee is claimed."
    )


def note(run: Run) -> str:
    """Say what this file itself gives away."""
    groups = (
        " The names of the groups are labels of the silos' examples, or words that are frequent in them."
        if part(run.start, "holds").get("groups")
        else ""
    )
    kept = run.start.get("losses") == "kept"
    told = "names, and of their losses no more than the mean" if kept else "names, how much each has, and their losses"
    return (
        f"This file holds no example of any silo.{groups} It does hold the silos' {told}: share it with those who may "
        "know these."
    )


def refusals(run: Run) -> str:
    """Say how many updates were dropped, and why."""
    reasons = Counter(reason for _, _, reason in dropped(run))
    listed = [f"{reason} ({count:,} times)" if count > 1 else reason for reason, count in reasons.most_common(5)]
    more = f", and {len(reasons) - 5:,} other reasons" if len(reasons) > 5 else ""
    count = sum(reasons.values())
    updates = f"{count:,} update{'s' * (count != 1)}"
    return f"{updates} did not count, and the rounds went on without: {'; '.join(listed)}{more}."


def dropped(run: Run) -> list[tuple[int, str, str]]:
    """Return each dropped update: round, silo and reason."""
    return [
        (entry["round"], plain(silo), plain(reason, 200))
        for entry in run.rounds
        for silo, reason in part(entry, "dropped").items()
    ]
