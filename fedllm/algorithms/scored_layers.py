"""FedPepTAO: only the layers that score highest are exchanged (Che et al., EMNLP 2023, arXiv:2310.15080).

Its partial prompt tuning: every silo scores each layer on a batch of its own text by the eigenvalues of the cosine
similarities of the layer's outputs, the server takes the mean weighted by the silos' examples, and the prompts of the
best layers are tuned together. Its momentum on both sides is `client.optimiser = "adamw"`, afresh every round, and
`optimiser.name = "fedavgm"`.

It differs from the paper: how many layers are exchanged is said, not found from the Hessian's eigenvalues; a row is
its last token's hidden state, not all its positions side by side, since rows differ in length; there are no control
variates between silo and server; and the prompts of the other layers are trained at each silo and stay there.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import generator
from fedllm.core.types import Algorithm, Exchange, Reply, Report, Request, Select, Share, Silo, State, Tensors
from fedllm.exchange.layers import layer_of
from fedllm.silo.layer_scores import layer_scores
from fedllm.silo.trainables import trained, write

KEY = "layers/scores"
"""Where the server's state has the scores."""

SCORE = "score"
"""The request for a silo's scores; nothing else leaves."""


def scored_layers(layers: int, rows: int = 8, every: int = 0) -> Share:
    """Exchange the `layers` that score highest on `rows` examples of each silo.

    They are scored before the first round, and again before every `every`-th one (0: never). What belongs to no layer
    is always exchanged. A scoring request carries all parameters down, its reply one number a layer.

    Raises:
        FedllmError: when the plan is made, if what is trained has not so many layers.
    """
    for key, value in {"layers": layers, "rows": rows}.items():
        if value < 1:
            raise FedllmError(f"share.{key} is {value}; it must be 1 or more.")
    if every < 0:
        raise FedllmError(f"share.every is {every}; it must be 0 (scored once) or more.")

    def around(algorithm: Algorithm, select: Select) -> Algorithm:
        def server(state: State, exchange: Exchange) -> tuple[State, Report]:
            scores, told = state.transforms.get(KEY), dict[str, float | str]()
            asked = list(select(state.round))
            if asked and (scores is None or (every and state.round % every == 0)):
                scores, told = consensus(state, asked, exchange)
            trained_layers = layers_of(state.params)
            # Where nobody is there to be asked, no reply comes either: which layers they are then does not matter.
            chosen = part(
                state.params, trained_layers[:layers] if scores is None else best(scores, trained_layers, layers)
            )
            known = {**state.transforms, **({KEY: scores} if scores is not None else {})}
            after, report = algorithm.server(state._replace(params=chosen, transforms=known), exchange)
            exchanged = ", ".join(str(layer) for layer in layers_of(chosen))
            return after._replace(params={**state.params, **after.params}), {**told, **report, "layers": exchanged}

        def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
            return scored(request, silo, rows) if request.op == SCORE else algorithm.client(request, silo)

        together = algorithm.cohort

        def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
            assert together is not None
            if any(request.op == SCORE for request, _ in members):
                return [client(*member) for member in members]
            return together(members)

        def wire(like: Tensors) -> Tensors:
            return algorithm.wire(part(like, require_layers(like, layers)[:layers]))

        return algorithm._replace(
            server=server,
            client=client,
            cohort=cohort if together else None,
            wire=wire,
            down=dict,
            ops=[*algorithm.ops, SCORE],
        )

    return Share(f"the {layers} layers that score highest", around=around, partial=True)


def layers_of(params: Tensors) -> list[int]:
    """Return the numbers of the layers that are trained, in order."""
    return sorted({layer for layer in map(layer_of, params) if layer is not None})


def require_layers(params: Tensors, count: int) -> list[int]:
    """Return the layers that are trained; refuse fewer than are to be exchanged."""
    found = layers_of(params)
    if len(found) < count:
        raise FedllmError(
            f"share.layers is {count} but what is trained has {len(found)} layers; "
            + ("lower it." if found else "use trainable.name = 'prefix' or 'lora', or share.name = 'everything'.")
        )
    return found


def best(scores_L: Tensor, layers: Sequence[int], count: int) -> list[int]:
    """Return the layers with the highest scores, the lower ones of equals.

    >>> best(torch.tensor([2.0, 5.0, 5.0, 1.0]), [0, 1, 2, 3], 1)
    [1]
    """
    order = sorted(range(len(layers)), key=lambda place: -float(scores_L[place]))
    return sorted(layers[place] for place in order[:count])


def part(params: Tensors, layers: Sequence[int]) -> dict[str, Tensor]:
    """Return the parameters of these layers and those of none."""
    return {name: value for name, value in params.items() if layer_of(name) in (None, *layers)}


def consensus(state: State, asked: Sequence[str], exchange: Exchange) -> tuple[Tensor, dict[str, float | str]]:
    """Ask silos for their scores; return the mean by examples, and why some were not counted."""
    count, found = len(layers_of(state.params)), dict[str, Reply]()
    told: dict[str, float | str] = {}
    for reply in exchange([Request(name, state.round, SCORE, state.params) for name in asked]):
        scores = reply.tensors.get("scores")
        sound = scores is not None and scores.shape == (count,) and scores.dtype == torch.float64
        if not (sound and scores is not None and bool(scores.isfinite().all()) and 0 < reply.weight <= 2**53):
            told[f"unscored.{reply.client}"] = "its scores are no finite number a layer"
        elif reply.client in asked and reply.client not in found and reply.round == state.round:
            found[reply.client] = reply
    if not found:
        raise FedllmError(f"Round {state.round + 1}: no silo scored the layers; resume when they can be reached.")
    # In the order of the names: whoever answers first must leave no trace in the sum.
    weight = sum(found[name].weight for name in sorted(found))
    return sum(
        (found[name].tensors["scores"] * (found[name].weight / weight) for name in sorted(found)),
        torch.zeros(count, dtype=torch.float64),
    ), told


def scored(request: Request, silo: Silo, rows: int) -> tuple[Reply, Tensors]:
    """Score the layers at a silo, with the parameters as they came; nothing is remembered of it."""
    params, layers = trained(silo.model), layers_of(request.tensors)
    write({name: params[name] for name in request.tensors}, request.tensors)
    examples = silo.data["train"]
    draw = torch.randperm(len(examples), generator=generator(silo.seed, SCORE, request.round))[:rows]
    chosen = [examples[place] for place in draw.tolist()]
    silo.model.eval()
    scores_L = layer_scores(silo.model, chosen, 0)[layers]
    silo.tick(sum(len(each.input_ids) for each in chosen))
    return Reply(request.client, request.round, {"scores": scores_L}, float(len(examples))), silo.memory
