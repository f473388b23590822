"""What is to be seen of a round: each silo's update as the server decodes it, and what became of the weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, overload

from fedllm.app import privacy
from fedllm.app.audits.case import Case
from fedllm.app.averaged import summing
from fedllm.app.catalog import make
from fedllm.app.secure import one_sum
from fedllm.app.sums import Wanted
from fedllm.core.optimisers import fedavg
from fedllm.core.round import averaging, everything, in_round, wire_stages
from fedllm.core.seeds import derive, generator
from fedllm.core.tensors import below, subtract
from fedllm.core.types import Reply, Request, Silo, Tensors, Work
from fedllm.runtime.local import local
from fedllm.silo.examples import Example


class View(NamedTuple):
    """One round as others see it."""

    each: Mapping[str, Tensors]
    """Each silo's update, decoded: what the server sees if nothing hides it. Behind a secure sum there is none."""
    whole: Tensors
    """Weights before less weights after: what is to be seen by whoever has both, noise of the server included."""


class Watched(Sequence[Example]):
    """Examples that remember which of them were read."""

    def __init__(self, examples: Sequence[Example]) -> None:
        self.examples, self.read = examples, dict[int, None]()

    def __len__(self) -> int:
        return len(self.examples)

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> Sequence[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | Sequence[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        self.read[range(len(self))[place]] = None
        return self.examples[place]


def round_of(case: Case, work: Work, data: Mapping[str, Sequence[Example]], number: int = 0) -> View:
    """Run a round of such work on such examples, from the run's last weights, and return what is to be seen of it.

    Clipping, codecs, noise and the average are the recipe's; the server takes the plain average as its step.
    """
    recipe, params, silos = one_sum(case.recipe), case.state.params, len(case.parts.silos.names)
    transforms = privacy.transforms(recipe, silos, case.secret)
    algorithm = averaging(
        work=work,
        select=lambda number: list(data),
        aggregate=make("aggregate", recipe.aggregate),
        optimiser=fedavg(),
        transforms=transforms,
        middleware=summing(Wanted(recipe, work, everything(), transforms, params, silos, case.secret)),
    )
    start = algorithm.init(params)._replace(round=number, transforms=case.state.transforms)
    replies: dict[str, Reply] = {}

    def opened(name: str) -> Silo:
        seed = derive(recipe.seed, "silo", name)
        return Silo(name, case.parts.model, {"train": data[name], "test": []}, {}, seed, case.ui.tick)

    exchange = local(algorithm.client, opened, {})

    def watched(requests: Sequence[Request]) -> Iterator[Reply]:
        for reply in exchange(requests):
            replies[reply.client] = reply
            yield reply

    after, _ = algorithm.server(start, watched)
    now = [
        in_round(part, number, below(f"{place}.{part.name}", start.transforms)) for place, part in enumerate(transforms)
    ]
    stages = wire_stages(transforms, params)
    each = {}
    for name, reply in [] if privacy.adds_up(recipe) else replies.items():
        update: Tensors = reply.tensors
        for transform, like in zip(reversed(now), reversed(stages[:-1]), strict=True):
            update = transform.decode(update, like)
        each[name] = update
    case.reset()
    return View(each, subtract(params, after.params))


def steps_on_one(case: Case, records: int, plain: bool, steps: int = 1) -> Work:
    """Return work on one record in `steps`: of `plain` gradient descent with rate 1, or of the recipe's optimiser.

    Noise of a silo's own is as strong as where it has so many `records`.
    """
    changes: dict[str, Any] = {"steps": steps, "epochs": None, "batch_size": 1, "micro_batch": 1}
    changes |= {"schedule": "constant", "warmup": 0, "floor": 0}
    if plain:
        changes |= {"optimiser": "sgd", "weight_decay": 0.0}
        # Noise that silos add together is as strong as the recipe's own rate has it.
        changes |= {} if privacy.in_sum(case.recipe) else {"learning_rate": 1.0}
    if privacy.hides_records(case.recipe):
        changes |= {"rate": 1.0, "noise": privacy.record_noise(case.recipe, records)}
    return case.parts.work(**changes)


def sampled(case: Case, name: str, count: int) -> list[Example]:
    """Return some of a silo's training examples, drawn by the audit's seed and cut to so many tokens."""
    import torch

    examples = case.parts.silos.examples(name)["train"]
    drawn = torch.randperm(len(examples), generator=generator(case.seed, "records", name))[:count].tolist()
    return [cut(examples[place], case.tokens) for place in drawn]


def cut(example: Example, tokens: int) -> Example:
    """Return at most so many tokens of an example, around the first that is scored.

    >>> cut(Example([1, 2, 3, 4, 5, 6], [-100, -100, -100, 4, 5, 6]), 4).input_ids
    [2, 3, 4, 5]
    """
    scored = next(place for place, label in enumerate(example.labels) if label >= 0 and place)
    first = max(0, min(scored - tokens // 2, len(example.input_ids) - tokens))
    return Example(example.input_ids[first : first + tokens], example.labels[first : first + tokens])
