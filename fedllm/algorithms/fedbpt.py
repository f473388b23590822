"""FedBPT: silos search on their own, the server merges where they came to.

Sun et al. 2023 (arXiv:2310.01467): each silo takes some generations of CMA-ES from the server's distribution, on
inference alone; what it found (the mean) is one individual of the server's own CMA-ES, the loss there its fitness.
Against a skewed silo's shortcuts a candidate's loss is divided by that on perturbed text (`perturb`), which should stay
high: a prompt that is right whatever the text says is no good. The server's step size before its update is that of the
silos' steps, sqrt(sum over silos and generations of sigma^2 / (K mu)), and the silos' next one moves as the server's
does. Both, and the division, are as in the authors' code (NVFlare, research/fed-bpt). Unlike there, fewer than three
answers are averaged, since CMA-ES has no update from them; and what travels is the mean, sigma and the covariance's
triangle, not an object.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.algorithms.black_box import both, evaluated, exported, projecting, prompt_of
from fedllm.algorithms.evolution import Search, ask, at, begin, new_search, tell
from fedllm.algorithms.method import Ground, Method, require_no_transforms
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.round import accept
from fedllm.core.seeds import derive, generator
from fedllm.core.types import Algorithm, Dataset, Exchange, Reply, Report, Request, Select, Silo, State, Step, Tensors
from fedllm.silo.candidates import Measure, Reader, drawn, require_measure, require_reading, soft_scores
from fedllm.silo.examples import IGNORED, Example
from fedllm.silo.reading import plain
from fedllm.silo.tasks import word_tokens


def fedbpt(
    ground: Ground,
    *,
    dim: int = 32,
    population: int = 10,
    generations: int = 4,
    sigma: float = 1.0,
    scale: float = 1.0,
    examples: int = 16,
    score: Measure = "choice",
    perturb: float = 0.5,
    text: str = "",
) -> Method:
    """Search a soft prompt by CMA-ES at the silos, `generations` a round, and merge their distributions.

    The other settings are those of `black_box`; `perturb` is the share of tokens that are replaced at random in the
    perturbed text (0: losses are not divided).
    """
    require_no_transforms("fedbpt", ground)
    search = new_search(dim, population, sigma, derive(ground.seed, "search"))
    name, tokens = prompt_of(ground)
    words = word_tokens(ground.tokenizer, ground.task)
    require_measure(score, words)
    require_reading(plain(ground.model))
    if generations < 1 or examples < 0 or not 0 <= perturb <= 1:
        raise FedllmError("algorithm.generations must be above 0, examples at least 0, and perturb between 0 and 1.")
    project = projecting(ground, name, tokens, search, scale, text)

    def client(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        seed = derive(silo.seed, "round", request.round)
        chosen = drawn(silo.data["train"], examples, seed)
        noisy = [perturbed(example, perturb, len(ground.tokenizer), seed, at) for at, example in enumerate(chosen)]
        told = list[int]()
        reader = Reader(
            silo.model, words, ground.tokenizer.pad_token_id, ground.batch_size, both(silo.tick, told.append)
        )

        def fitness(points_PD: Tensor) -> Tensor:
            prompts_PTH = project(silo.model).prompts(points_PD).to(next(silo.model.parameters()).dtype)
            scores_P = soft_scores(reader, prompts_PTH, chosen, score)
            return scores_P / soft_scores(reader, prompts_PTH, noisy, score).clamp(min=1e-6) if perturb else scores_P

        own, sigmas = search._replace(seed=seed), list[float]()
        sent = request.tensors
        state = at(own, sent["mean"].cpu(), float(sent["sigma"]), untriangle(sent["triangle"].cpu(), dim))
        for _ in range(generations):
            points_PD = ask(own, state)
            sigmas.append(float(state["sigma"]))
            state = tell(own, state, points_PD, fitness(points_PD))
        there = fitness(state["mean"][None])
        update = {
            "mean": state["mean"].float(),
            "fitness": there.float(),
            "sigmas": torch.tensor([*sigmas, float(state["sigma"])]),
        }
        calls = float((generations * population + 1) * len(chosen) * (2 if perturb else 1))
        scalars = {"train_loss": float(there), "tokens": float(sum(told)), "calls": calls}
        return Reply(request.client, request.round, update, float(len(chosen)), scalars), {}

    def blank() -> dict[str, Tensor]:
        sizes = {"mean": dim, "fitness": 1, "sigmas": generations + 1}
        return {key: torch.empty(size, device="meta") for key, size in sizes.items()}

    def algorithm(select: Select) -> Algorithm:
        def server(state: State, exchange: Exchange) -> tuple[State, Report]:
            names, report, answers = list(select(state.round)), dict[str, float | str](), dict[str, Reply]()
            waiting = set(names)
            for reply in exchange([Request(silo, state.round, "train", state.params) for silo in names]):
                try:
                    accept(reply, state.round, waiting, (), [blank()])
                    if float(reply.tensors["sigmas"].min()) <= 0:
                        raise Refused("its sigma is not above 0")
                except Refused as problem:
                    report[f"dropped.{reply.client}"] = str(problem)
                    continue
                waiting.discard(reply.client)
                answers[reply.client] = reply
                report |= {f"{key}.{reply.client}": value for key, value in reply.scalars.items()}
            for silo in sorted(waiting):
                report.setdefault(f"dropped.{silo}", "no reply")
            report |= {"clients": len(answers), "asked": len(names)}
            if names and not answers:
                raise FedllmError(f"Round {state.round + 1} has no usable reply; look at the silos, then resume.")
            if not answers:
                return state._replace(round=state.round + 1), report
            # In one order whatever the order of arrival, so that the sums have the same bits.
            found = [answers[silo].tensors for silo in names if silo in answers]
            report |= {"score": sum(float(each["fitness"]) for each in found) / len(found)}
            report |= {"best_score": min(float(each["fitness"]) for each in found)}
            kept, local = merged(search, state.optimiser, found)
            return State(
                state.round + 1, sent_of(kept, local), {**kept, "local": torch.tensor([local]).double()}, {}
            ), report

        def init(params: Tensors) -> State:
            return State(0, params, {**begin(search), "local": torch.tensor([sigma]).double()}, {})

        steps = [
            Step("server", "send mean, sigma and covariance"),
            Step("silo", f"{generations} generations of CMA-ES"),
            Step("server", "merge the means by their fitness"),
        ]
        return Algorithm(init, client, server, None, steps, lambda params: blank(), dict)

    def ticks(data: Dataset) -> int:
        rows = population * min(examples or len(data["train"]), len(data["train"]))
        return (generations * -(-rows // ground.batch_size) + 1) * (2 if perturb else 1)

    return Method(
        "fedbpt",
        sent_of(begin(search), sigma),
        algorithm,
        evaluated(ground, project),
        exported(project),
        folder="adapter",
        shown=lambda state: {"z": state.params["mean"]},
        steps=ticks,
        notes=[
            (
                "search",
                f"CMA-ES in {dim} dimensions for a prompt of {tokens} tokens; {generations} generations a round",
            ),
            ("leaves", "a silo's mean, its fitness and step sizes; no text"),
        ],
    )


def merged(search: Search, state: Tensors, found: Sequence[Tensors]) -> tuple[dict[str, Tensor], float]:
    """Return the server's search after the silos' means as its generation, and the silos' next step size."""
    own, local = {name: value for name, value in state.items() if name != "local"}, float(state["local"])
    means_KD = torch.stack([each["mean"].cpu().double() for each in found])
    if len(found) < 3:
        last = [float(each["sigmas"][-1]) for each in found]
        return {**own, "mean": means_KD.mean(0)}, math.sqrt(sum(value**2 for value in last) / len(last))
    before = server_sigma([each["sigmas"][:-1] for each in found], parents_of(search.population))
    size = search._replace(population=len(found))
    fitness_K = torch.cat([each["fitness"].cpu() for each in found])
    after = tell(size, {**own, "sigma": torch.tensor([before]).double()}, means_KD, fitness_K, parents=len(found))
    return after, local * float(after["sigma"]) / before


def server_sigma(sigmas: Sequence[Tensor], parents: int) -> float:
    """Return the server's step size: sqrt(sum over K silos and their generations of sigma^2 / (K mu)).

    >>> server_sigma([torch.tensor([3.0, 4.0]), torch.tensor([0.0, 5.0])], 4)
    2.5
    """
    return math.sqrt(sum(float((each.double() ** 2).sum()) for each in sigmas) / len(sigmas) / parents)


def parents_of(population: int) -> int:
    """Return how many candidates a mean is made of."""
    return population // 2


def sent_of(state: Tensors, sigma: float) -> dict[str, Tensor]:
    """Return the distribution as it travels."""
    return {
        "mean": state["mean"].float(),
        "sigma": torch.tensor([sigma], dtype=torch.float32),
        "triangle": triangle(state["C"]).float(),
    }


def triangle(covariance_DD: Tensor) -> Tensor:
    """Return the upper triangle of a symmetric matrix, row after row."""
    rows, columns = torch.triu_indices(*covariance_DD.shape)
    return covariance_DD[rows, columns]


def untriangle(values: Tensor, dim: int) -> Tensor:
    """Return the symmetric matrix of an upper triangle."""
    whole_DD = torch.zeros(dim, dim, dtype=values.dtype)
    rows, columns = torch.triu_indices(dim, dim)
    whole_DD[rows, columns] = values
    return whole_DD + whole_DD.triu(1).T


def perturbed(example: Example, rate: float, vocabulary: int, seed: int, place: int) -> Example:
    """Return the example with that share of its unscored tokens replaced by any of the vocabulary."""
    draw = generator(seed, "perturb", place)
    size = len(example.input_ids)
    hit = (torch.rand(size, generator=draw) < rate).tolist()
    other = torch.randint(vocabulary, (size,), generator=draw).tolist()
    triples = zip(example.input_ids, example.labels, hit, other, strict=True)
    return Example([new if hit and label == IGNORED else old for old, label, hit, new in triples], example.labels)
