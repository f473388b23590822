"""LoRA averaged as the products B A that its factors stand for, which a sum of silos does as well as a mean.

The mean of A times the mean of B is not the mean of B A (Sun et al. 2024, arXiv:2403.12313, section 2). Stacking the
silos' factors, as FLoRA does (Wang et al. 2024, arXiv:2409.05976), is exact and shows the server each silo's; the mean
of the products is exact too and needs no more than their sum. As in FlexLoRA (Bai et al. 2024, arXiv:2402.11505) the
server brings it back to rank r by a truncated singular value decomposition.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor

from fedllm.core.errors import FedllmError
from fedllm.core.tensors import below, under
from fedllm.core.types import (
    Algorithm,
    Exchange,
    Facts,
    Reply,
    Report,
    Request,
    Select,
    Share,
    Silo,
    State,
    Tensors,
    Work,
)
from fedllm.exchange.lora_error import layers, other
from fedllm.exchange.low_rank import factors

HALF, PRODUCT = ".lora_A.", ".lora_BA."


def product() -> Share:
    """Send the factors down, and up the change of B A of each layer, dense, with all else that is trained as it is.

    The server steps from B A: with plain averaging B A becomes the mean of what the silos ended at, and what another
    optimiser remembers is of products. The step is then brought to the rank that the factors have; `truncation_error`
    in the report is what this loses, ||M - B A|| / ||M|| over all layers. LoRA's factor alpha / r, which all silos have
    in common, is not in what is sent: a `clip` bounds B A without it.

    Raises:
        FedllmError: when the plan is made, if what is trained has no two factors that make a matrix.
    """

    def work(work: Work) -> Work:
        together = work.cohort

        def end(request: Request, answer: tuple[Reply, Tensors]) -> tuple[Reply, Tensors]:
            reply, memory = answer
            return reply._replace(tensors=changed(request.tensors, reply.tensors)), memory

        def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
            return end(request, work.client(request, silo))

        def cohort(members: Sequence[tuple[Request, Silo]]) -> list[tuple[Reply, Tensors]]:
            assert together is not None
            return [end(request, each) for (request, _), each in zip(members, together(members), strict=True)]

        def claim(facts: Facts) -> Facts:
            known = work.claim(facts)
            if known.norm_bound is not None:
                raise FedllmError(
                    "share.name is 'product', and noise that silos add together for records (client.noise_in = 'sum') "
                    "is measured for factors; use 'distributed_dp', or trainable.name = 'ffa_lora' with share.name = "
                    "'everything'."
                )
            return known

        return work._replace(client=client, cohort=cohort if together else None, claim=claim)

    def around(algorithm: Algorithm, select: Select) -> Algorithm:
        def init(params: Tensors) -> State:
            return algorithm.init(products(params))._replace(params=dict(params))

        def server(state: State, exchange: Exchange) -> tuple[State, Report]:
            whole = products(state.params)
            before, known = dict(whole), {**state.transforms, **under("share", state.params)}
            after, report = algorithm.server(state._replace(params=whole, transforms=known), exchange)
            moved = {name: value for name, value in after.params.items() if value is not before[name]}
            params, told = factored(state.params, moved)
            return after._replace(params=params), {**report, **told}

        return algorithm._replace(init=init, server=server, down=dict)

    return Share(
        "the products B A",
        down=lambda state, client: below("share", state.transforms),
        up=lambda number, params: products(params),
        work=work,
        around=around,
    )


def products(params: Tensors) -> dict[str, Tensor]:
    """Return parameters with B A in place of each layer's factors; those that have it already as they are."""
    if not any(PRODUCT in name for name in params):
        require_factors(params)
    return joined(params, lambda a, b: params[b] @ params[a])


def changed(start: Tensors, update: Tensors) -> dict[str, Tensor]:
    """Return start - end with B A in place of the factors, from that of the factors.

    With D for start - end it is D(B) A + (B - D(B)) D(A), in which nothing large cancels.
    """
    return joined(update, lambda a, b: update[b] @ start[a] + (start[b] - update[b]) @ update[a])


def joined(tensors: Tensors, made: Callable[[str, str], Tensor]) -> dict[str, Tensor]:
    """Return the tensors with one in place of each layer's two factors, `made` of their names."""
    halves = layers(tensors)
    pairs, gone = {name: other(name) for name in halves}, {other(name) for name in halves}
    return {
        name.replace(HALF, PRODUCT): made(name, pairs[name]) if name in pairs else value
        for name, value in tensors.items()
        if name not in gone
    }


def require_factors(params: Tensors) -> None:
    """Raise unless some of what is trained are LoRA's factors, and all of those are matrices."""
    if not layers(params):
        frozen = any(".lora_B." in name for name in params)
        raise FedllmError(
            "share.name is 'product' and A is frozen, so that the mean of B is exact already; use share.name = "
            "'everything'."
            if frozen
            else "share.name is 'product', which is for LoRA's factors, and nothing that is trained is one; use "
            "trainable.name = 'lora', or share.name = 'everything'."
        )
    factors = [(name, value) for name, value in params.items() if name in layers(params) or ".lora_embedding_" in name]
    if odd := [name for name, value in factors if value.dim() != 2 or ".lora_embedding_" in name]:
        raise FedllmError(
            f"share.name is 'product', and '{odd[0]}' is no factor of a linear layer; name linear layers only in "
            "trainable.target_modules, or use share.name = 'everything'."
        )


def factored(params: Tensors, moved: Tensors) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the parameters after those that `moved`, products as factors of the rank that they had, and the error."""
    after, off, whole = dict(params), 0.0, 0.0
    for name, value in moved.items():
        if PRODUCT not in name:
            after[name] = value
            continue
        a = name.replace(PRODUCT, HALF)
        after[a], after[other(a)] = factors(value, params[a])
        left = value.double() - after[other(a)].double() @ after[a].double()
        off, whole = off + float(left.square().sum()), whole + float(value.double().square().sum())
    return after, {"truncation_error": (off / whole) ** 0.5} if whole else {}
