"""Local training that hides each record: differentially private SGD inside a silo.

Abadi et al. 2016 (arXiv:1607.00133), algorithm 1: every record is drawn with the same probability, its gradient is
clipped on its own, and noise is added to the sum, which is divided by the number of records that is drawn on average.
What leaves the silo has the noise on it, so nobody outside needs to be trusted with a record. How many records the
silo has is taken as public.

Each record's gradient is exact. Where only LoRA is trained in float32 they come many at a time: as a cohort of clients
with one record each, so that the shared matmuls stay large (`silo/cohort.py`); else one after the other. A step's
records are computed in order of their length, so that few of them are padded.
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
from fedllm.silo.width import pass_tokens


class Guard(NamedTuple):
    """What the node that trains has for its noise."""

    secret: bytes
    """Only this node has it."""
    noise: Callable[[int], float]
    """From the silo's number of records to the noise multiplier."""


ROOM = 4.0
"""Where noise is added to the sum of all silos: the norm that one silo's gradients together may have, over
clip * batch_size. To bring a longer one down to it moves no record's part further."""


class Room(NamedTuple):
    """How much is computed at once: so many records, padded to so many tokens."""

    records: int = 64
    """Their gradients are added in float32 before they go into float64, so there is an end to it."""
    tokens: int = 1 << 30


Gradients = Callable[[Sequence[Example]], dict[str, Tensor]]
"""From any number of records to the sum of their clipped gradients, in float64."""


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
    micro_batch: int | None = None,
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
    `micro_batch` records are computed at a time, or as many of like length as this kind of device computes best. Of a
    model in bfloat16 they are computed one by one: beside others a record's gradient would round otherwise, by more
    than the noise allows for. The optimiser starts afresh every round.

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
        stepping = inner_optimiser(silo.model, params, inner, {})
        with ExitStack() as stack, seeded(derive(silo.seed, "fit", request.round), device):
            room = Room(tokens=pass_tokens(silo.model, device)) if micro_batch is None else Room(micro_batch)
            gradients = clipped_gradients(silo.model, params, objective, pad_id, clip, room, stack)
            if noise_in == "sum":
                rows = drawn(records, chance, key_of(secret, "drawn", 0))
                update = short_sum(gradients(rows), ROOM * clip * batch_size)
                silo.tick(tokens_of(rows))
                scaled = {name: value * (learning_rate / batch_size) for name, value in update.items()}
                home = {name: value.to(request.tensors[name].device) for name, value in scaled.items()}
                return Reply(request.client, request.round, home, 1.0), {}
            for step in range(steps):
                set_rate(stepping, inner, request.round * steps + step, (rounds or 0) * steps)
                rows = drawn(records, chance, key_of(secret, "drawn", step))
                total = {name: value.float() for name, value in gradients(rows).items()}
                noised = with_noise(total, deviation, key_of(secret, "noise", step))
                for name, value in params.items():
                    value.grad = noised[name] / expected
                stepping.step()
                silo.tick(tokens_of(rows))
        for value in params.values():
            value.grad = None
        update = subtract(start, {name: value.detach() for name, value in params.items()})
        home = {name: value.to(request.tensors[name].device) for name, value in update.items()}
        return Reply(request.client, request.round, home, float(len(records))), {}

    def claim(facts: Facts) -> Facts:
        return facts._replace(norm_bound=learning_rate * clip * ROOM) if noise_in == "sum" else facts

    return Work(client, None, lambda data: steps, claim)


def drawn(records: Sequence[Example], chance: float, key: bytes) -> list[Example]:
    """Return the records that are drawn, each with the same chance."""
    return [records[place] for place in (uniform(key, len(records)) < chance).nonzero().flatten().tolist()]


def tokens_of(rows: Sequence[Example]) -> int:
    """Return how many tokens some records have."""
    return sum(len(row.input_ids) for row in rows)


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
    room: Room,
    stack: ExitStack,
) -> Gradients:
    """Return what computes clipped gradients: many at a time where the model is plain LoRA in float32, else one by one.

    Until `stack` is closed the model may have other layers in place of its own.
    """
    device = next(iter(params.values())).device
    many: Mapping[str, nn.Parameter] = params
    if alone := room.records == 1 or not stackable(model) or not all_float32(model):
        room = Room(1)
    else:
        many = stack.enter_context(stacked(model, {name: value.detach()[None] for name, value in params.items()}))

    def gradients(rows: Sequence[Example]) -> dict[str, Tensor]:
        total = {name: torch.zeros_like(value, dtype=torch.float64) for name, value in params.items()}
        for some in together(rows, room):
            for name, value in many.items():
                value.grad = None
                if not alone:
                    # All records see the same weights: one copy is enough, and each has a gradient of its own.
                    value.data = params[name].detach().expand(len(some), *params[name].shape)
            batch = collate(some, pad_id, device)
            (objective(model, batch) / batch.tokens_B.clamp(min=1)).sum().backward()
            each = {name: grad_of(value)[None] if alone else grad_of(value) for name, value in many.items()}
            for name, part in summed(each, clip).items():
                total[name] += part
        return total

    return gradients


def all_float32(model: nn.Module) -> bool:
    """Say whether a model computes in float32 throughout."""
    return all(value.dtype == torch.float32 for value in model.parameters())


def together(rows: Sequence[Example], room: Room) -> Iterator[list[Example]]:
    """Yield rows that are computed at once, the longest first, so that rows of like length come together.

    >>> sizes = [9, 2, 8, 3]
    >>> [[len(row.input_ids) for row in some] for some in together([Example([0] * n, []) for n in sizes], Room(3, 18))]
    [[9, 8], [3, 2]]
    """
    some: list[Example] = []
    for row in sorted(rows, key=lambda row: len(row.input_ids), reverse=True):
        if some and (len(some) == room.records or (len(some) + 1) * len(some[0].input_ids) > room.tokens):
            yield some
            some = []
        some.append(row)
    if some:
        yield some


def grad_of(value: nn.Parameter) -> Tensor:
    """Return a parameter's gradient: 0 where nothing depends on it."""
    return torch.zeros_like(value) if value.grad is None else value.grad


def summed(each: Tensors, clip: float) -> dict[str, Tensor]:
    """Return the sum of gradients [C, ...], each scaled down to an L2 norm of `clip`; one that is not finite is 0."""
    norms = [torch.linalg.vector_norm(grad.flatten(1), dim=1) for grad in each.values()]
    norm_C = torch.linalg.vector_norm(torch.stack(norms), dim=0)
    scale_C, whole_C = (clip / norm_C.clamp(min=1e-12)).clamp(max=1.0), norm_C.isfinite()
    if not bool(whole_C.all()):
        each, scale_C = {name: grad[whole_C] for name, grad in each.items()}, scale_C[whole_C]
    return {name: (scale_C @ grad.flatten(1)).view(grad.shape[1:]) for name, grad in each.items()}


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
    clip: float, noise: float | None, steps: int, rate: float | None, batch_size: int, micro_batch: int | None
) -> None:
    """Raise for settings that cannot be meant."""
    for key, value in {"clip": clip, "steps": steps, "batch_size": batch_size, "micro_batch": micro_batch}.items():
        if value is not None and value <= 0:
            raise FedllmError(f"client.{key} is {value:g}; it must be above 0.")
    if rate is not None and not 0 < rate <= 1:
        raise FedllmError(f"client.rate is {rate:g}; it must be above 0 and at most 1.")
    if noise is not None and not noise > 0:
        raise FedllmError(f"client.noise is {noise:g}; it must be above 0, or else there is no privacy.")
