"""How far the update that a supposed text would have made is from the one that was seen: what a descent goes down.

The reconstruction loss of Balunovic et al. 2022 (LAMP, arXiv:2202.08827), equation 3: one less the cosine, tensor by
tensor, since nobody tells the attacker the learning rate or what a clip left. DLG (Zhu et al. 2019, arXiv:1906.08935)
has the squared distance in its place, and TAG (arXiv:2103.06819) adds the absolute one; both need that scale.

The labels of a causal language model are its text, so they are not guessed apart, as in DLG, nor known, as in LAMP.
Each place has a share of every candidate token, the softmax over the cosines of its embedding with theirs: these shares
are the labels, and they say which rows of the embedding the place's gradient belongs to.

An update of Adam after few steps holds hardly more than signs; there the signs of the gradient are compared.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from fedllm.audit.layers import device_of
from fedllm.core.types import Tensors

SIGNS = 4.0
"""Largest over mean absolute value up to which an update is taken for the sum of a few steps' signs."""

LEAST = 1e-30
"""What squared lengths are kept above, so that those of nothing have a gradient."""


class Seen(NamedTuple):
    """An update, and what the attacker knows of how it was made."""

    model: nn.Module
    """In evaluation mode, with the weights before the step."""
    update: Tensors
    """Those tensors of it that say something: finite and not 0."""
    tokens_C: Tensor
    """The candidates."""
    scored_T: Tensor
    """Which places of the text are labels: the recipe and its template tell, the length is taken as known."""
    signs: bool


def seen(model: nn.Module, update: Tensors, candidates: Sequence[int], scored: Sequence[bool]) -> Seen | None:
    """Return what there is to match; None where an update says nothing, or too little is scored or named."""
    telling = {
        name: value.detach().float()
        for name, value in update.items()
        if bool(value.isfinite().all()) and bool(value.any())
    }
    if not telling or not any(scored[1:]) or len(candidates) < 2:
        return None
    sizes = torch.cat([value[value != 0].abs() for value in telling.values()])
    device = device_of(model)
    return Seen(
        model,
        telling,
        torch.tensor(list(candidates), device=device),
        torch.tensor(list(scored), device=device),
        bool(sizes.max() <= SIGNS * sizes.mean()),
    )


def table(seen: Seen) -> Tensor:
    """Return the candidates' embeddings, as table_CI."""
    weight_VI: Tensor = seen.model.get_input_embeddings().weight  # type: ignore[operator]
    return weight_VI.detach()[seen.tokens_C].float()


def shares(x_TI: Tensor, table_CI: Tensor, heat: float) -> Tensor:
    """Return each place's share of every candidate, as share_TC: the hotter, the more even."""
    return (cosines(x_TI, table_CI) / heat).softmax(-1)


def cosines(x_TI: Tensor, table_CI: Tensor) -> Tensor:
    """Return the cosine of each place's embedding with each candidate's, as cosine_TC."""
    return functional.normalize(x_TI, dim=-1) @ functional.normalize(table_CI, dim=-1).T


def gradients(seen: Seen, x_TI: Tensor, share_TC: Tensor) -> dict[str, Tensor]:
    """Return the gradient of each seen tensor for a text.

    `x_TI` are its input embeddings and `share_TC` what its tokens are. The gradients have a gradient.
    """
    named = dict(seen.model.named_parameters())
    params = {name: named[name] for name in seen.update}
    embedding: Tensor = seen.model.get_input_embeddings().weight  # type: ignore[operator]
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):
        given_TI = x_TI if x_TI.requires_grad else x_TI.detach().requires_grad_()
        logits_TV = seen.model(inputs_embeds=given_TI[None].to(embedding.dtype), use_cache=False).logits[
            0, -len(x_TI) :
        ]
        log_TC = logits_TV[:-1].float().log_softmax(-1)[:, seen.tokens_C]
        each_T = -(share_TC[1:] * log_TC).sum(-1)
        found = torch.autograd.grad(
            (each_T * seen.scored_T[1:]).sum(),
            [*params.values(), given_TI],
            create_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        made = dict(zip(params, found[:-1], strict=True))
        for name, value in params.items():
            if value is embedding:
                # The text went in as embeddings, so that what its tokens' rows get for it is added here.
                made[name] = made[name].index_add(0, seen.tokens_C, (share_TC.T @ found[-1]).to(made[name].dtype))
    return made


def mismatch(seen: Seen, made: Tensors, smooth: bool = False) -> Tensor:
    """Return the mean over the seen tensors of one less the cosine, from 0 to 2; `smooth` signs have a gradient."""
    away = list[Tensor]()
    for name, value in seen.update.items():
        one = made[name].float()
        if seen.signs:
            one = one / (one.abs() + one.detach().abs().mean() + LEAST) if smooth else one.sign()
        length = (one.square().sum() + LEAST).sqrt() * value.norm()
        away.append(1 - (one * value).sum() / length)
    return torch.stack(away).mean()


def supposed(seen: Seen, texts: Sequence[Sequence[int]]) -> list[tuple[float, float]]:
    """Return the mismatch of each text that has these of the candidates, and its loss in nats a token, all at once."""
    named = dict(seen.model.named_parameters())
    params = {name: named[name].detach() for name in seen.update}

    def losses(params: dict[str, Tensor], ids_T: Tensor) -> tuple[Tensor, Tensor]:
        call = {"input_ids": ids_T[None], "use_cache": False}
        logits_TV = functional_call(seen.model, params, (), call).logits[0, -len(ids_T) :]
        each_T = functional.cross_entropy(logits_TV[:-1].float(), ids_T[1:], reduction="none")
        return (each_T * seen.scored_T[1:]).sum(), each_T.mean()

    def judged(ids_T: Tensor) -> tuple[Tensor, Tensor]:
        made, loss = grad(losses, has_aux=True)(params, ids_T)
        return mismatch(seen, made), loss

    with sdpa_kernel(SDPBackend.MATH), torch.enable_grad():
        apart_N, loss_N = vmap(judged)(seen.tokens_C[torch.tensor(texts)])
    return list(zip(apart_N.tolist(), loss_N.tolist(), strict=True))


def offers(seen: Seen, places: Sequence[int], count: int) -> list[tuple[int, int]]:
    """Return the replacements, place and candidate, that would lower a text's mismatch most if it were straight.

    The first-order estimate of HotFlip (Ebrahimi et al. 2018, arXiv:1712.06751), on tokens as inputs and as labels.
    """
    table_CI = table(seen)
    share_TC = functional.one_hot(torch.tensor(list(places), device=table_CI.device), len(table_CI)).float()
    share_TC.requires_grad_()
    made = gradients(seen, share_TC @ table_CI, share_TC)
    (slope_TC,) = torch.autograd.grad(mismatch(seen, made, smooth=True), share_TC)
    gain_TC = slope_TC.gather(1, share_TC.argmax(1, keepdim=True)) - slope_TC
    best = gain_TC.flatten().topk(min(count, gain_TC.numel())).indices.tolist()
    return [divmod(each, len(table_CI)) for each in best]
