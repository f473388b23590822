"""Local training: what a client does in a round, alone or as one of a cohort trained as one batch.

McMahan et al. 2017 (arXiv:1602.05629), ClientUpdate; with `proximal` FedProx, Li et al. 2020
(arXiv:1812.06127), equation 2: the local loss gets mu / 2 * ||w - w_t||^2, hence its gradient mu * (w - w_t).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.core.tensors import subtract
from fedllm.core.types import Cohort, Reply, Request, Silo, Tensors, Work
from fedllm.silo.cohort import stacked
from fedllm.silo.fit import Fit, Settings, fit, seeded, stack, step_count
from fedllm.silo.objective import Objective
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
    optimiser: Literal["adamw", "sgd"] = "adamw",
    max_grad_norm: float = 1.0,
    proximal: float = 0.0,
) -> Work:
    """Train for `steps` batches a round (10 if nothing is said) or for `epochs` passes over the silo's text.

    `micro_batch` rows are computed at a time and their gradients accumulated. Gradients are scaled
    down to `max_grad_norm` (0: not at all). The optimiser starts afresh every round. The reply is
    start - end, weighted by the silo's number of examples.
    """
    if steps is not None and epochs is not None:
        raise FedllmError("client.steps and client.epochs are both set; keep one of them.")
    sizes = {"steps": steps, "epochs": epochs, "batch_size": batch_size, "micro_batch": micro_batch}
    for key, value in sizes.items():
        if value is not None and value <= 0:
            raise FedllmError(f"client.{key} is {value}; it must be above 0.")
    settings = Settings(
        steps=10 if steps is None and epochs is None else steps,
        epochs=epochs,
        batch_size=batch_size,
        micro_batch=min(micro_batch or batch_size, batch_size),
        learning_rate=learning_rate,
        weight_decay=weight_decay,
        optimiser=optimiser,
        max_grad_norm=max_grad_norm,
        proximal=proximal,
    )

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        params = trained(silo.model)
        write(params, request.tensors)
        start = {name: value.detach().clone() for name, value in params.items()}
        device = next(iter(params.values())).device
        with seeded(derive(silo.seed, "fit", request.round), device):
            told = fit(silo.model, params, start, [(request, silo)], settings, objective, pad_id)
        update = subtract(start, {name: value.detach() for name, value in params.items()})
        return answer(request, silo, update, told, 0)

    def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        model = members[0][1].model
        start = stack([request.tensors for request, _ in members], next(model.parameters()).device)
        with stacked(model, start) as params:
            told = fit(model, params, start, members, settings, objective, pad_id)
            update = subtract(start, {name: value.detach() for name, value in params.items()})
        return [
            answer(request, silo, {name: value[place] for name, value in update.items()}, told, place)
            for place, (request, silo) in enumerate(members)
        ]

    return Work(client, by_equal_steps(cohort, settings), lambda data: step_count(settings, data))


def by_equal_steps(cohort: Cohort, settings: Settings) -> Cohort:
    """Train those members of a cohort together that take the same number of steps."""

    def grouped(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
        groups: dict[int, list[int]] = {}
        for place, (_, silo) in enumerate(members):
            groups.setdefault(step_count(settings, silo.data), []).append(place)
        answers = {
            place: each
            for places in groups.values()
            for place, each in zip(places, cohort([members[place] for place in places]), strict=True)
        }
        return [answers[place] for place in range(len(members))]

    return grouped


def answer(request: Request, silo: Silo, update: dict[str, Tensor], told: Fit, place: int) -> tuple[Reply, Tensors]:
    """Return a member's reply, its tensors where the request's were, and its memory, which is none."""
    home = {name: value.to(request.tensors[name].device) for name, value in update.items()}
    weight = float(len(silo.data["train"]))
    scalars = {"train_loss": told.loss_C[place], "tokens": told.tokens_C[place]}
    return Reply(request.client, request.round, home, weight, scalars), {}
