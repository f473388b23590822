"""Local training that hides each record: differentially private SGD inside a silo.

Abadi et al. 2016 (arXiv:1607.00133), algorithm 1: every record is drawn with the same probability, its gradient is
clipped on its own, and noise is added to the sum, which is divided by the number of records that is drawn on average.
What leaves the silo has the noise on it, so nobody outside needs to be trusted with a record. How many records the
silo has is taken as public.

Each record's gradient is exact. Where only LoRA is trained they come many at a time: as a cohort of clients with one
record each, so that the shared matmuls stay large (`silo/cohort.py`); else one after the other.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.core.errors import FedllmError
from fedllm.core.noise import digest, key_of, require_float32, uniform, with_noise
from fedllm.core.schedule import Schedule, Shape, require_schedule
from fedllm.core.seeds import derive
from fedllm.core.tensors import subtract
from fedllm.core.types import Facts, Reply, Request, Silo, Tensors, Work
from fedllm.silo.cohort import stackable, stacked
from fedllm.silo.examples import Example, collate
from fedllm.silo.fit import seeded
from fedllm.silo.inner import Inner, inner_optimiser, set_rate
from fedllm.silo.objective import Objective
from fedllm.silo.trainables import trained, write


class Guard(NamedTuple):
    """What the node that trains has for its noise."""

    secret: bytes
    """Only this node has it."""
    noise: Callable[[int], float]
    """From the silo's number of records to the noise multiplier."""


ROOM = 4.0
"""Where noise is added to the sum of all silos: the norm that one silo's gradients together may have, over
clip * batch_size. To bring a longer one down to it moves no record's part further."""

Gradients = Callable[[Sequence[Example]], dict[str, Tensor]]
"""From up to `micro_batch` records to the sum of their clipped gradients."""


def dp_sgd(
    objective: Objective,
    pad_id: int,
    guard: Guard,
    *,
    clip: float,
    noise: float | None = None,
    noise_in: Literal["silo", "sum"] = "silo",
    steps: int = 10,
    rate: float | None = None,
    batch_size: int = 32,
    micro_batch: int = 8,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    optimiser: Literal["adamw", "sgd"] = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    schedule: Shape = "constant",
    warmup: float = 0.0,
    floor: float = 0.0,
    rounds: int | None = None,
) -> Work:
    """Take `steps` noisy steps a round, each on records drawn with probability `rate`.

    Without a rate it is `batch_size` over the silo's number of records, so that a silo with more of them pays less
    for each. A record's loss is the mean over its scored tokens; its gradient is scaled down to an L2 norm of `clip`,
    and the standard deviation of the noise on the sum is `noise` * `clip`, or what privacy.target_epsilon asks for.
    `micro_batch` records are computed at a time. The optimiser starts afresh every round.

    Nothing but the update leaves: no loss and no count of tokens, which would have no noise on them.

    With `noise_in` the sum a silo takes no step of its own: once a round it replies `learning_rate` times the sum of
    its records' clipped gradients over `batch_size`, without noise, for a secure sum of all silos to which each adds
    its part. There `batch_size` is the same for all, whatever the rate; the server's optimiser takes the step.
    """
    if noise_in == "sum":
        require_one_step(steps, schedule, weight_decay)
    require_sense(clip, noise, steps, rate, batch_size, micro_batch)
    over = Schedule(schedule, warmup, floor)
    require_schedule("client", over, rounds)
    inner = Inner(optimiser, learning_rate, betas, weight_decay, over, False)

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        params, records = trained(silo.model), silo.data["train"]
        write(params, request.tensors)
        require_float32(params)
        start = {name: value.detach().clone() for name, value in params.items()}
        device = next(iter(params.values())).device
        chance = rate_of(rate, batch_size, len(records))
        expected = chance * len(records)
        deviation = (guard.noise(len(records)) if noise is None else noise) * clip * slack(expected)
        # Bound to what was sent: to other weights in the same round it answers with noise and records of their own.
        secret = key_of(guard.secret, "records", silo.seed, request.round, digest(request.tensors))
        stepping = inner_optimiser(params, inner, {})
        with ExitStack() as stack, seeded(derive(silo.seed, "fit", request.round), device):
            gradients = clipped_gradients(silo.model, params, objective, pad_id, clip, micro_batch, stack)
            if noise_in == "sum":
                drawn = uniform(key_of(secret, "drawn", 0), len(records)) < chance
                rows = [records[place] for place in drawn.nonzero().flatten().tolist()]
                update = short_sum(added_up(gradients, rows, params, micro_batch), ROOM * clip * batch_size)
                silo.tick(0)
                scaled = {name: value * (learning_rate / batch_size) for name, value in update.items()}
                home = {name: value.to(request.tensors[name].device) for name, value in scaled.items()}
                return Reply(request.client, request.round, home, 1.0), {}
            for step in range(steps):
                set_rate(stepping, inner, request.round * steps + step, (rounds or 0) * steps)
                drawn = uniform(key_of(secret, "drawn", step), len(records)) < chance
                rows = [records[place] for place in drawn.nonzero().flatten().tolist()]
                total = added_up(gradients, rows, params, micro_batch)
                noised = with_noise(
                    {name: value.float() for name, value in total.items()}, deviation, key_of(secret, "noise", step)
                )
                for name, value in params.items():
                    value.grad = noised[name] / expected
                stepping.step()
                silo.tick(0)
        for value in params.values():
            value.grad = None
        update = subtract(start, {name: value.detach() for name, value in params.items()})
        home = {name: value.to(request.tensors[name].device) for name, value in update.items()}
        return Reply(request.client, request.round, home, float(len(records))), {}

    def claim(facts: Facts) -> Facts:
        return facts._replace(norm_bound=learning_rate * clip * ROOM) if noise_in == "sum" else facts

    return Work(client, None, lambda data: steps, claim)


def added_up(
    gradients: Gradients, rows: Sequence[Example], params: Mapping[str, Tensor], micro_batch: int
) -> dict[str, Tensor]:
    """Return the sum of the records' clipped gradients, in float64."""
    total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
    for first in range(0, len(rows), micro_batch):
        for name, part in gradients(rows[first : first + micro_batch]).items():
            total[name] += part
    return total


def short_sum(total: Tensors, largest: float) -> dict[str, Tensor]:
    """Return a sum of gradients as float32, scaled down to a norm."""
    length = math.sqrt(sum(float(value.square().sum()) for value in total.values()))
    scale = min(1.0, largest / max(length, 1e-30))
    return {name: (value * scale).float() for name, value in total.items()}


def rate_of(rate: float | None, batch_size: int, records: int) -> float:
    """Return the probability with which each record is drawn for a step.

    >>> rate_of(None, 8, 32), rate_of(None, 8, 4), rate_of(0.1, 8, 32)
    (0.25, 1.0, 0.1)
    """
    return min(1.0, batch_size / records) if rate is None else rate


def slack(expected: float) -> float:
    """Return by how much rounding can lengthen what one record adds: the noise is scaled up by as much.

    Of 1 / 1024 most is for norms in float32; other records in its micro-batch change a gradient in its last bits.
    """
    return 1 + 2.0**-10 + expected * 2.0**-18


def clipped_gradients(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    objective: Objective,
    pad_id: int,
    clip: float,
    width: int,
    stack: ExitStack,
) -> Gradients:
    """Return what computes clipped gradients, `width` at a time where the model is plain LoRA, else one by one."""
    device = next(iter(params.values())).device
    if not stackable(model) or width == 1:
        return lambda rows: summed(one_by_one(model, params, objective, pad_id, rows, device), clip)
    many = stack.enter_context(stacked(model, {name: value.detach()[None].repeat(width, *[1] * value.dim())
                                               for name, value in params.items()}))  # fmt: skip

    def gradients(rows: Sequence[Example]) -> dict[str, Tensor]:
        # Rows are grouped by client, so each of them needs one; the last ones are repeated and left out of the sum.
        filled = [*rows, *[rows[-1]] * (width - len(rows))]
        batch = collate(filled, pad_id, device)
        for name, value in many.items():
            value.grad = None
            value.data.copy_(params[name].detach())
        (objective(model, batch) / batch.tokens_B.clamp(min=1)).sum().backward()
        each = {name: grad_of(value)[: len(rows)] for name, value in many.items()}
        return summed([each], clip)

    return gradients


def one_by_one(
    model: nn.Module,
    params: Mapping[str, nn.Parameter],
    objective: Objective,
    pad_id: int,
    rows: Sequence[Example],
    device: torch.device,
) -> Iterator[dict[str, Tensor]]:
    """Yield the gradient of each record, with a leading dimension of 1."""
    for row in rows:
        for value in params.values():
            value.grad = None
        batch = collate([row], pad_id, device)
        (objective(model, batch) / batch.tokens_B.clamp(min=1)).sum().backward()
        yield {name: grad_of(value)[None] for name, value in params.items()}


def grad_of(value: nn.Parameter) -> Tensor:
    """Return a parameter's gradient: 0 where nothing depends on it."""
    return torch.zeros_like(value) if value.grad is None else value.grad


def summed(groups: Sequence[dict[str, Tensor]] | Iterator[dict[str, Tensor]], clip: float) -> dict[str, Tensor]:
    """Return the sum of gradients, each scaled down to an L2 norm of `clip`; one that is not finite counts as 0."""
    total: dict[str, Tensor] = {}
    for each in groups:
        norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in each.values()]
        norm_C = torch.linalg.vector_norm(torch.stack(norms), dim=0)
        scale_C = (clip / norm_C.clamp(min=1e-12)).clamp(max=1.0)
        whole = bool(norm_C.isfinite().all())
        for name, grad in each.items():
            scaled = grad * scale_C.view(-1, *[1] * (grad.dim() - 1))
            if not whole:
                scaled = scaled[norm_C.isfinite()]
            part = scaled.sum(0)
            total[name] = total[name] + part if name in total else part
    return total


def require_one_step(steps: int, schedule: Shape, weight_decay: float) -> None:
    """Raise for settings of a silo's own optimiser where it takes no step of its own."""
    if steps != 1:
        raise FedllmError(
            f"client.noise_in is 'sum' and client.steps is {steps}: noise in the sum hides a record in the one step "
            "that all silos take together, and not in steps that each takes by itself; set client.steps = 1."
        )
    if schedule != "constant" or weight_decay:
        raise FedllmError(
            "client.noise_in is 'sum', where the server takes the step; leave client.schedule and client.weight_decay "
            "out, and set [optimiser]."
        )


def require_sense(
    clip: float, noise: float | None, steps: int, rate: float | None, batch_size: int, micro_batch: int
) -> None:
    """Raise for settings that cannot be meant."""
    for key, value in {"clip": clip, "steps": steps, "batch_size": batch_size, "micro_batch": micro_batch}.items():
        if value <= 0:
            raise FedllmError(f"client.{key} is {value:g}; it must be above 0.")
    if rate is not None and not 0 < rate <= 1:
        raise FedllmError(f"client.rate is {rate:g}; it must be above 0 and at most 1.")
    if noise is not None and not noise > 0:
        raise FedllmError(f"client.noise is {noise:g}; it must be above 0, or else there is no privacy.")
