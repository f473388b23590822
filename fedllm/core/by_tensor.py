"""How a round ends whose replies lie outside of memory: one tensor of all is summed and applied, then the next.

A sum of all tensors is four times the model, and a step makes another model and what the optimiser remembers of it.
Here there is one tensor of each at a time. To the bit it comes to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

from torch import Tensor

from fedllm.core.types import Aggregator, Aside, Reply, ServerOptimizer, State, Tensors, on_meta


def those_aside_last(replies: Iterator[Reply], usable: Callable[[Reply], bool]) -> Iterator[Reply]:
    """Yield replies as they come, and at the end those outside of memory that were `usable` when they came."""
    aside = list[Reply]()
    for reply in replies:
        if isinstance(reply.tensors, Aside) and usable(reply):
            aside.append(reply)
        else:
            yield reply
        del reply
    yield from aside


class Sum(NamedTuple):
    """What was added as it came, or what waits to be added, with its weights."""

    like: Tensors
    added: list[Any]
    """The aggregator's total, if there is one."""
    waiting: list[tuple[Aside, float]]


def patient(aggregate: Aggregator) -> Aggregator:
    """Let updates wait if all of them lie outside of memory; so does their aggregate, and is made when it is read."""

    def add(total: Sum, update: Tensors, weight: float) -> Sum:
        if isinstance(update, Aside) and not total.added:
            total.waiting.append((update, weight))
            return total
        late = [*total.waiting, (update, weight)]
        total.waiting.clear()
        for each in late:
            now = total.added.pop() if total.added else aggregate.zero(total.like)
            total.added.append(aggregate.add(now, *each))
        return total

    def done(total: Sum) -> Tensors:
        def read(name: str) -> Tensor:
            one = aggregate.zero({name: total.like[name]})
            for update, weight in total.waiting:
                one = aggregate.add(one, {name: update[name]}, weight)
            return aggregate.done(one)[name]

        return aggregate.done(total.added[0]) if total.added else Aside(total.waiting[0][0].like, read)

    return aggregate._replace(zero=lambda like: Sum(like, [], []), add=add, done=done)


def step(
    optimiser: ServerOptimizer, mean: Tensors, state: State, finish: Callable[[Tensors], Tensors]
) -> tuple[Tensors, Tensors]:
    """Return the parameters and the optimiser's state after the aggregate was finished and applied.

    If the aggregate lies outside of memory, new tensors take the places of the old ones in `state`: it is used up.
    """
    if not isinstance(mean, Aside) or mean.keys() - state.params.keys():
        # Of a search's scores no tensor is the change of a parameter.
        return optimiser.step(state.params, finish(dict(mean)), state.optimiser)
    params, kept = state.params, state.optimiser
    assert isinstance(params, dict) and isinstance(kept, dict)
    # What an optimiser remembers of no tensor in particular, such as how many steps it took, is the same for all.
    common = {key: kept[key] for key in optimiser.init({})}
    for name in mean:
        start = {name: params[name]}
        own = {key: kept[key] for key in optimiser.init(on_meta(start))} | common
        moved, remembered = optimiser.step(start, finish({name: mean[name]}), own)
        params.update(moved)
        kept.update(remembered)
    return params, kept
