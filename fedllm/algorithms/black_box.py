"""Black-box soft prompts: a search by scores alone, in which nothing but scores leaves a silo.

Black-Box Tuning (Sun et al. 2022, arXiv:2201.03514): the prompt is p = p0 + A z with a fixed random A, and CMA-ES
searches z; no gradient is needed, only inference. Federated here in the plainest way: the server samples a generation,
every silo replies the mean score of each candidate on its own examples, and CMA-ES is told the average of them. So what
goes up is an ordinary average of one number a candidate, to which every transform and aggregate applies.
`algorithms/fedbpt.py` is the published federated method, in which silos search on their own in between.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from fedllm.algorithms.evolution import Search, ask, begin, new_search, tell
from fedllm.algorithms.method import Ground, Method
from fedllm.core.errors import FedllmError
from fedllm.core.round import averaging
from fedllm.core.seeds import derive, generator
from fedllm.core.types import (
    Algorithm,
    Client,
    Dataset,
    Probe,
    Reply,
    Request,
    Select,
    ServerOptimizer,
    Share,
    Silo,
    Tensors,
    Work,
)
from fedllm.silo.candidates import Measure, Reader, drawn, require_measure, require_reading, soft_scores
from fedllm.silo.evaluate import held_out
from fedllm.silo.reading import plain
from fedllm.silo.tasks import word_tokens
from fedllm.silo.trainables import export, trained, write


class Projection(NamedTuple):
    """p0 + A z, and the parameter that it is."""

    name: str
    start_TH: Tensor
    matrix_ND: Tensor
    """N being T times H."""

    def prompts(self, z_PD: Tensor) -> Tensor:
        """Return the prompts of points, in float32: prompts_PTH."""
        moved_PN = z_PD.float().to(self.matrix_ND.device) @ self.matrix_ND.T
        return self.start_TH + moved_PN.view(-1, *self.start_TH.shape)


def black_box(
    ground: Ground,
    *,
    dim: int = 64,
    population: int = 20,
    sigma: float = 1.0,
    scale: float = 1.0,
    examples: int = 16,
    score: Measure = "choice",
    text: str = "",
) -> Method:
    """Search a soft prompt by CMA-ES at the server, from scores alone.

    `dim` is z's, `population` the candidates of a round, `examples` what a silo scores them on in a round (0: all).
    `sigma` is the first standard deviation of z, which moves the prompt by `scale` times that of the model's
    embeddings. `text` is what the prompt starts as, word by word; without it, as the trainable begins.
    """
    search = new_search(dim, population, sigma, derive(ground.seed, "search"))
    name, tokens = prompt_of(ground)
    words = word_tokens(ground.tokenizer, ground.task)
    require_measure(score, words)
    require_reading(plain(ground.model))
    if examples < 0:
        raise FedllmError(f"algorithm.examples is {examples}; give a number, or 0 for all of a silo's.")
    project = projecting(ground, name, tokens, search, scale, text)

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        chosen = drawn(silo.data["train"], examples, derive(silo.seed, "round", request.round))
        prompts_PTH = project(silo.model).prompts(request.tensors["candidates"])
        told = list[int]()
        reader = Reader(
            silo.model, words, ground.tokenizer.pad_token_id, ground.batch_size, both(silo.tick, told.append)
        )
        scores_P = soft_scores(reader, prompts_PTH.to(next(silo.model.parameters()).dtype), chosen, score)
        scalars = {
            "train_loss": float(scores_P.mean()),
            "tokens": float(sum(told)),
            "calls": float(len(scores_P) * len(chosen)),
        }
        return Reply(request.client, request.round, {"scores": scores_P.float()}, float(len(chosen)), scalars), {}

    def steps(data: Dataset) -> int:
        rows = population * min(examples or len(data["train"]), len(data["train"]))
        return -(-rows // ground.batch_size)

    def algorithm(select: Select) -> Algorithm:
        made = averaging(
            work=Work(client, None, steps),
            select=select,
            aggregate=ground.aggregate,
            optimiser=cma_es(search),
            share=Share("candidates down, scores up", up=lambda number, params: {"scores": blank(params)}),
            transforms=ground.transforms,
            probes=[best_score()],
        )
        named = [
            step._replace(name="score the candidates") if step.where == "silo" else step for step in made.steps[:2]
        ]
        return made._replace(down=dict, steps=[*named, *made.steps[2:]])

    return Method(
        "black_box",
        {"candidates": ask(search, begin(search)).half()},
        algorithm,
        evaluated(ground, project),
        exported(project),
        folder="adapter",
        shown=lambda state: {"z": state.optimiser["mean"].float()},
        steps=steps,
        notes=[
            ("search", f"CMA-ES in {dim} dimensions for a prompt of {tokens} tokens; {population} candidates a round"),
            (
                "leaves",
                f"{population} scores a silo and round, each the mean over {examples or 'all'} examples; no text",
            ),
        ],
    )


def prompt_of(ground: Ground) -> tuple[str, int]:
    """Return the name and the tokens of the soft prompt that the model learns, which must be all that it learns."""
    learned = trained(ground.model)
    wide = plain(ground.model).get_input_embeddings().weight.shape[1]
    if len(learned) != 1 or next(iter(learned.values())).shape[1:] != (wide,):
        raise FedllmError(
            f"The search is for a soft prompt, not for '{ground.trainable.name}'; set trainable.name = 'prompt'."
        )
    ((name, value),) = learned.items()
    most = getattr(plain(ground.model).config, "max_position_embeddings", None)
    if most and len(value) >= most:
        raise FedllmError(f"trainable.tokens is {len(value)}, but the model sees {most} tokens at once; give it fewer.")
    return name, len(value)


def projecting(
    ground: Ground, name: str, tokens: int, search: Search, scale: float, text: str
) -> Callable[[nn.Module], Projection]:
    """Return what makes the projection when it is first needed, since a plan has no embeddings to measure.

    A's values are normal with standard deviation scale * s / (sqrt(d) * sigma), s being that of the embeddings: the
    rule of BBT as its authors' code has it.
    """

    @lru_cache(maxsize=1)
    def project(model: Any) -> Projection:
        weight_VH = plain(model).get_input_embeddings().weight.detach()
        start_TH = trained(model)[name].detach().float().clone()
        if text:
            ids = ground.tokenizer(text, add_special_tokens=False)["input_ids"]
            if not ids:
                raise FedllmError("algorithm.text has no token; write some words or leave it out.")
            start_TH = weight_VH[[ids[at % len(ids)] for at in range(tokens)]].float().clone()
        std = scale * float(weight_VH.float().std()) / (search.dim**0.5 * search.sigma)
        shape = (start_TH.numel(), search.dim)
        matrix_ND = torch.randn(shape, generator=generator(ground.seed, "projection")) * std
        return Projection(name, start_TH, matrix_ND.to(start_TH.device))

    return project


def both(first: Callable[[int], None], second: Callable[[int], None]) -> Callable[[int], None]:
    """Tell both."""

    def tick(tokens: int) -> None:
        second(tokens)
        first(tokens)

    return tick


def blank(params: Tensors) -> Tensor:
    """Return a score of nothing for each candidate."""
    return params["candidates"].new_zeros(len(params["candidates"]), dtype=torch.float32)


def cma_es(search: Search) -> ServerOptimizer:
    """Tell CMA-ES the mean scores of a generation and sample the next; candidates travel in half precision."""

    def init(params: Tensors) -> Tensors:
        return begin(search)

    def step(params: Tensors, mean: Tensors, state: Tensors) -> tuple[Tensors, Tensors]:
        told = tell(search, state, params["candidates"].float().cpu(), mean["scores"].cpu())
        return {"candidates": ask(search, told).half()}, told

    return ServerOptimizer(f"cma_es in {search.dim} dimensions", init, step)


def best_score() -> Probe:
    """Report the mean and the best of a generation's scores over all silos."""

    def add(total: tuple[Tensor, float], update: Tensors, weight: float) -> tuple[Tensor, float]:
        return total[0] + weight * update["scores"].double(), total[1] + weight

    def done(total: tuple[Tensor, float]) -> dict[str, float]:
        mean_P = total[0] / total[1]
        return {"score": float(mean_P.mean()), "best_score": float(mean_P.min())}

    return Probe("scores", lambda like: (torch.zeros(like["scores"].shape, dtype=torch.float64), 0.0), add, done)


def evaluated(ground: Ground, project: Callable[[nn.Module], Projection]) -> Client:
    """Evaluate the prompt of the point that is sent."""
    inner = held_out(ground.objective, ground.task, ground.tokenizer, ground.trainable, batch_size=ground.batch_size)

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        made = project(silo.model)
        prompt_TH = made.prompts(request.tensors["z"][None])[0]
        return inner(request._replace(tensors={made.name: prompt_TH}), silo)

    return client


def exported(project: Callable[[nn.Module], Projection]) -> Callable[[nn.Module, Tensors, Path], None]:
    """Write the prompt as peft's own folder."""

    def to(model: nn.Module, shown: Tensors, folder: Path) -> None:
        made = project(model)
        write(trained(model), {made.name: made.prompts(shown["z"][None])[0]})
        export(model, folder)

    return to
