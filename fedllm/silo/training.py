"""Local training: what a client does in a round, alone or as one of a cohort trained as one batch.

McMahan et al. 2017 (arXiv:1602.05629), ClientUpdate; with `proximal` FedProx, Li et al. 2020
(arXiv:1812.06127), equation 2: the local loss gets mu / 2 * ||w - w_t||^2, hence its gradient mu * (w - w_t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.schedule import Schedule, Shape, require_schedule
from fedllm.core.seeds import derive
from fedllm.core.tensors import subtract
from fedllm.core.types import Reply, Request, Silo, Tensors, Work
from fedllm.silo.cohort import by_equal_steps, stack, stacked
from fedllm.silo.fit import Fit, Settings, fit, seeded, step_count
from fedllm.silo.inner import Inner, InnerName, kept_of, sound, stack_kept
from fedllm.silo.objective import Objective
from fedllm.silo.sharded import gathered, part_of
from fedllm.silo.trainables import trained, write


def local_training(
    objective: Objective,
    pad_id: int,
    *,
    steps: int | None = None,
    epochs: float | None = None,
    batch_size: int = 8,
    micro_batch: int | None = None,
    learning_rate: float = 1e-3,
    weight_decay: float = 0.0,
    optimiser: InnerName = "adamw",
    betas: tuple[float, float] = (0.9, 0.999),
    keep_optimiser: bool = False,
    schedule: Shape = "constant",
    warmup: float = 0.0,
    floor: float = 0.0,
    rounds: int | None = None,
    weight: Literal["examples", "tokens"] = "examples",
    max_grad_norm: float = 1.0,
    proximal: float = 0.0,
) -> Work:
    """Train for `steps` batches a round (10 if nothing is said) or for `epochs` passes over the silo's text.

    `micro_batch` rows are computed at a time and their gradients accumulated. Gradients are scaled
    down to `max_grad_norm` (0: not at all). The optimiser starts afresh every round, or with
    `keep_optimiser` goes on with the moments that stayed at the silo. `muon` is AdamW but for the matrices of a model
    that is trained whole (`silo/muon.py`).

    The learning rate rises over the first `warmup` steps (below 1: that share of all), then is `constant` or falls,
    `linear` or as a `cosine`, to `floor` times itself over all steps of all `rounds`. Step i of round r is
    number r * steps + i of the run, also for a silo that comes late or was away, and so is its batch. A silo that is
    told that it is `slow` takes the first of a round's steps, as many as it has time for.

    The reply is start - end, weighted by the silo's number of `examples`, or by the `tokens` that it was scored on in
    this round: then one step of SGD at every silo is one step on all their batches together.
    """
    if steps is not None and epochs is not None:
        raise FedllmError("client.steps and client.epochs are both set; keep one of them.")
    sizes = {"steps": steps, "epochs": epochs, "batch_size": batch_size, "micro_batch": micro_batch}
    for key, value in sizes.items():
        if value is not None and value <= 0:
            raise FedllmError(f"client.{key} is {value}; it must be above 0.")
    if not all(0 <= beta < 1 for beta in betas):
        raise FedllmError(f"client.betas is {list(betas)}; both must be at least 0 and below 1.")
    over = Schedule(schedule, warmup, floor)
    require_schedule("client", over, rounds)
    settings = Settings(
        steps=10 if steps is None and epochs is None else steps,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=min(micro_batch or batch_size, batch_size),
        rounds=rounds or 0,
        inner=Inner(optimiser, learning_rate, betas, weight_decay, over, keep_optimiser),
        max_grad_norm=max_grad_norm,
        proximal=proximal,
    )

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        params = trained(silo.model)
        write(params, request.tensors)
        start = {name: value.detach().clone() for name, value in params.items()}
        device = next(iter(params.values())).device
        rank = part_of(params).rank
        with seeded(derive(silo.seed, "fit", request.round, *([rank] if rank else [])), device):
            kept = silo.memory if keep_optimiser else {}
            told = fit(silo.model, params, start, [(request, silo)], settings, objective, pad_id, kept)
        update = gathered(subtract(start, {name: value.detach() for name, value in params.items()}))
        return answer(request, silo, update, told, 0, weight), sound(gathered(told.kept))

    def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        model = members[0][1].model
        start = stack([request.tensors for request, _ in members], next(model.parameters()).device)
        with stacked(model, start) as params:
            kept = stack_kept([silo.memory for _, silo in members]) if keep_optimiser else {}
            told = fit(model, params, start, members, settings, objective, pad_id, kept)
            update = subtract(start, {name: value.detach() for name, value in params.items()})
        each = [{name: value[place] for name, value in update.items()} for place in range(len(members))]
        return [
            (answer(request, silo, each[place], told, place, weight), sound(kept_of(told.kept, place)))
            for place, (request, silo) in enumerate(members)
        ]

    return Work(client, by_equal_steps(cohort, settings), lambda data: step_count(settings, data))


def answer(request: Request, silo: Silo, update: dict[str, Tensor], told: Fit, place: int, weight: str) -> Reply:
    """Return a member's reply, its tensors where the request's were."""
    home = {name: value.to(request.tensors[name].device) for name, value in update.items()}
    behind = float(len(silo.data["train"]) if weight == "examples" else told.scored_C[place])
    scalars = {"train_loss": told.loss_C[place], "tokens": told.tokens_C[place]}
    return Reply(request.client, request.round, home, behind, scalars)
