"""What methods that send prompts share: replies that are checked, silos that sit out, a prompt's evaluation."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

from fedllm.algorithms.method import Ground
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.round import LARGEST_WEIGHT
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Algorithm, Client, Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.silo.asking import Measured
from fedllm.silo.endpoint import Unanswered
from fedllm.silo.questions import Asking

SAT_OUT = "unanswered"

Value = TypeVar("Value")


def gathered(
    exchange: Exchange, requests: Sequence[Request], read: Callable[[Reply], Value]
) -> tuple[dict[str, Value], dict[str, float | str]]:
    """Return what can be read of the silos' replies, in the order of the requests, and the report of the round.

    Nothing in a reply is trusted: `read` raises `Refused` for what it does not like. A silo whose model did not answer
    is counted with the others that are dropped.

    Raises:
        FedllmError: if silos were asked and none gave a reply that can be used.
    """
    asked = {request.client: request.round for request in requests}
    found, report = dict[str, Value](), dict[str, float | str]()
    for reply in exchange(requests):
        try:
            if reply.client not in asked or reply.client in found or reply.round != asked[reply.client]:
                raise Refused("it was not asked, or has answered already")
            if not 0 < reply.weight <= LARGEST_WEIGHT or not all(map(math.isfinite, reply.scalars.values())):
                raise Refused(f"its weight is {reply.weight}, or one of its numbers is not finite")
            require_answered(reply)
            found[reply.client] = read(reply)
        except Refused as problem:
            report[f"dropped.{reply.client}"] = str(problem)
            continue
        report |= {f"{key}.{reply.client}": value for key, value in reply.scalars.items()}
    for name in asked:
        if name not in found:
            report.setdefault(f"dropped.{name}", "no reply")
    if asked and not found:
        reasons = "; ".join(
            f"{key.removeprefix('dropped.')}: {why}" for key, why in report.items() if "dropped." in key
        )
        raise FedllmError(f"No silo's reply of this round can be used ({reasons}); mend that, then resume.")
    report |= {"clients": len(found), "asked": len(asked)}
    return {name: found[name] for name in asked if name in found}, report


def require_answered(reply: Reply) -> None:
    """Refuse the reply of a silo that sits the round out."""
    if f"{SAT_OUT}.utf8" in reply.tensors:
        raise Refused(f"its model did not answer: {' '.join(texts_in(SAT_OUT, reply.tensors, 1, 1000))}")


def sitting_out(client: Client) -> Client:
    """Let a client whose model does not answer sit the round out, and say why."""

    def asked(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        try:
            return client(request, silo)
        except Unanswered as problem:
            why = as_tensors(SAT_OUT, [str(problem)[:300]])
            return Reply(request.client, request.round, why, 1.0), silo.memory

    return asked


def prompting(
    ground: Ground,
    client: Client,
    server: Callable[[Select, State, Exchange], tuple[State, Report]],
    steps: Sequence[Step],
    sent_up: Tensors,
) -> Callable[[Select], Algorithm]:
    """Return what makes the algorithm of a method that sends prompts, once it is known who is asked.

    Its client's texts are looked through before they leave, and it sits a round out when its model does not answer;
    `sent_up` is what its largest reply looks like.
    """
    guarded = ground.guard(sitting_out(client))
    return lambda select: Algorithm(
        lambda params: State(0, dict(params), {}, {}),
        guarded,
        lambda state, exchange: server(select, state, exchange),
        None,
        steps,
        lambda like: sent_up,
    )


def evaluating(measured: Callable[[Request, Silo], Measured]) -> Client:
    """Return the client that answers `evaluate` with a prompt's loss and accuracy, as far as there are any."""

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        try:
            found = measured(request, silo)
        except Unanswered:
            return Reply(request.client, request.round, {}, 1.0), silo.memory
        told = {"loss": found.loss, "accuracy": found.accuracy, "scored": float(found.tokens)}
        scalars = {key: value for key, value in told.items() if value is not None}
        return Reply(request.client, request.round, {}, max(1.0, found.tokens), scalars), silo.memory

    return client


def asked_of(ground: Ground, name: str) -> Asking:
    """Return how the run's rows are asked, or refuse a task that asks nothing."""
    if ground.asking is None:
        raise FedllmError(
            f"algorithm '{name}' asks questions, which the task '{ground.task.name}' has none of; "
            "set task.name to 'classify' or 'instruct'."
        )
    return ground.asking


def require_counts(**counts: int) -> None:
    """Refuse settings that would ask nothing."""
    for name, count in counts.items():
        if count < 1:
            raise FedllmError(f"algorithm.{name} is {count}; it must be at least 1.")


def mean_of(scores: Mapping[str, Sequence[float]], weights: Mapping[str, float]) -> list[float]:
    """Return the weighted mean over silos of each place, silos in the order of their names."""
    whole = math.fsum(weights[name] for name in scores)
    columns = zip(*(scores[name] for name in sorted(scores)), strict=True)
    each = [weights[name] for name in sorted(scores)]
    return [math.fsum(w * v for w, v in zip(each, column, strict=True)) / whole for column in columns]
