"""How a round ends whose replies lie outside of memory: one tensor of all is summed and applied, then the next.

A sum of all tensors is four times the model, and a step makes another model and what the optimiser remembers of it.
Here there is one tensor of each at a time, and of a sum, where a tensor can be read in parts, as much as stays in the
cache. To the bit it comes to the same.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fedllm.core.room import room_for
from fedllm.core.types import Aggregator, Aside, Reply, ServerOptimizer, State, Tensors, on_meta

PART = 1 << 14
"""Values that are summed or applied at a time: a sum and what it needs beside it are 40 bytes for each."""


def those_aside_last(
    replies: Iterator[Reply], taken: Callable[[Reply], Tensors | None]
) -> Iterator[tuple[Reply, Tensors]]:
    """Yield the replies that are `taken`, with their updates, as they come, and those outside of memory at the end."""
    aside = list[tuple[Reply, Tensors]]()
    for reply in replies:
        update = taken(reply)
        if isinstance(update, Aside):
            aside.append((reply, update))
        elif update is not None:
            yield reply, update
        # The next reply is on its way: of two large ones only one should be in memory.
        del reply, update
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
        if total.added:
            return aggregate.done(total.added[0])
        waiting = total.waiting
        # The tensors themselves would be kept alive here while a step replaces them.
        empty = {name: value.new_zeros(()) for name, value in total.like.items()}

        # Memory of sums of whole parts, which are many, is used again.
        used = dict[torch.dtype, Any]()

        def summed(name: str, start: int, stop: int) -> Tensor:
            kind, usual = empty[name].expand(stop - start), stop - start == PART
            one = used.pop(kind.dtype, None) if usual else None
            if one is None:
                one = aggregate.zero({"": kind})
            for update, weight in waiting:
                one = aggregate.add(one, part_of(update, name, start, stop), weight)
            mean = aggregate.done(one)[""]
            if aggregate.again and usual:
                used[kind.dtype] = aggregate.again(one)
            return mean

        def read(name: str) -> Tensor:
            mean = room_for(waiting[0][0].like[name], empty[name].device)
            whole = mean.numel()
            for start, stop in parts(whole, PART if all(update.cut for update, _ in waiting) else whole):
                mean.view(-1)[start:stop].copy_(summed(name, start, stop))
            return mean

        return Aside(waiting[0][0].like, read)

    return aggregate._replace(zero=lambda like: Sum(like, [], []), add=add, done=done)


def parts(whole: int, size: int) -> Iterator[tuple[int, int]]:
    """Yield from where to where each part of so many values goes; nothing is one part too.

    >>> list(parts(7, 3)), list(parts(0, 3))
    ([(0, 3), (3, 6), (6, 7)], [(0, 0)])
    """
    return ((start, min(start + size, whole)) for start in range(0, whole or 1, size or 1))


def part_of(update: Aside, name: str, start: int, stop: int) -> Aside:
    """Return the values from one place of a tensor to another, flat, which stay outside of memory."""

    def read(_: str) -> Tensor:
        return update.cut(name, start, stop) if update.cut else update[name].flatten()[start:stop]

    return Aside({"": torch.empty(stop - start, dtype=update.like[name].dtype, device="meta")}, read)


def step(
    optimiser: ServerOptimizer, mean: Tensors, state: State, finish: Callable[[Tensors], Tensors]
) -> tuple[Tensors, Tensors]:
    """Return the parameters and the optimiser's state after the aggregate was finished and applied.

    If the aggregate lies outside of memory, `state` is used up: of each tensor the new values are written over its
    mean, which takes its place among the parameters, and what an optimiser remembers of it over what it remembered.
    """
    if not isinstance(mean, Aside) or mean.keys() - state.params.keys():
        # Of a search's scores no tensor is the change of a parameter.
        return optimiser.step(state.params, finish(dict(mean)), state.optimiser)
    params, kept = state.params, state.optimiser
    assert isinstance(params, dict) and isinstance(kept, dict)
    # What an optimiser remembers of no tensor in particular, such as how many steps it took, is the same for all.
    common = {key: kept[key] for key in optimiser.init({})}
    counted = common
    for name in mean:
        counted = step_one(optimiser, name, finish({name: mean[name]})[name], params, kept, common)
    kept.update(counted)
    return params, kept


def step_one(
    optimiser: ServerOptimizer,
    name: str,
    change: Tensor,
    params: dict[str, Tensor],
    kept: dict[str, Tensor],
    common: dict[str, Tensor],
) -> dict[str, Tensor]:
    """Apply one tensor's aggregate, and return what the optimiser now remembers of no tensor in particular."""
    own = [key for key in optimiser.init(on_meta({name: params[name]})) if key not in common]
    # Others may hold the old parameter, such as who began the run; its mean and its memory are held here alone.
    param = over(change, params[name])
    kept.update({key: over(kept[key], kept[key]) for key in own})
    counted = common
    # The last values of a vector are rounded otherwise in shorter floats.
    for start, stop in parts(change.numel(), PART if change.dtype == torch.float32 else change.numel()):
        begun = {name: cut(params[name], start, stop)}
        held = {key: cut(kept[key], start, stop) for key in own} | common
        moved, remembered = optimiser.step(begun, {name: cut(change, start, stop)}, held)
        cut(param, start, stop).copy_(moved[name])
        for key in own:
            cut(kept[key], start, stop).copy_(remembered[key])
        counted = {key: remembered[key] for key in common}
    params[name] = param
    return counted


def over(used: Tensor, like: Tensor) -> Tensor:
    """Return a tensor to be written over as its values are read, or a copy where it cannot take those of `like`."""
    return used if used.dtype == like.dtype and used.is_contiguous() else room_for(like).copy_(used)


def cut(value: Tensor, start: int, stop: int) -> Tensor:
    """Return the values from one place of a tensor to another, flat."""
    return value.flatten()[start:stop]
