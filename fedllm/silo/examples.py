"""Examples, their order, and batches.

The shape suffixes here and in all tensor code:
B rows of a batch, T tokens, V vocabulary, C clients of a cohort, R rank, I inputs, O outputs.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple, overload

import torch
from torch import Tensor

from fedllm.core.seeds import generator
from fedllm.silo.block_order import reckoned

IGNORED = -100
"""The label of a token that is not scored."""


LISTED = 1 << 20
"""Examples up to which a shuffled order is held as a list."""


class Example(NamedTuple):
    """One tokenised text; `labels` equals `input_ids` where a token is scored, else `IGNORED`."""

    input_ids: list[int]
    labels: list[int]


class Together(NamedTuple):
    """The text of several silos, of which every batch is the silos' own batches, one after the other.

    `each` are their examples and the seeds of their orders; `rows` is how many each gives to a batch.
    """

    each: Sequence[tuple[Sequence[Example], int]]
    rows: int


class Joined(Sequence[Example]):
    """Several silos' examples, one silo after the other."""

    def __init__(self, parts: Sequence[Sequence[Example]]) -> None:
        self._parts, self._ends = parts, list(accumulate(map(len, parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    @overload
    def __getitem__(self, place: int) -> Example: ...

    @overload
    def __getitem__(self, place: slice) -> list[Example]: ...

    def __getitem__(self, place: int | slice) -> Example | list[Example]:
        if isinstance(place, slice):
            return [self[each] for each in range(len(self))[place]]
        place = range(len(self))[place]
        part = bisect_right(self._ends, place)
        return self._parts[part][place - (self._ends[part - 1] if part else 0)]


class Batch(NamedTuple):
    """Rows padded on the right, so that a causal model needs no mask: padding is never looked at."""

    input_ids_BT: Tensor
    labels_BT: Tensor

    @property
    def tokens_B(self) -> Tensor:
        """Scored tokens a row; the first of a row has nothing before it."""
        return (self.labels_BT[:, 1:] != IGNORED).sum(1)


def spread(examples: Sequence[Example], most: int) -> Sequence[Example]:
    """Return at most so many examples, spread evenly over all of them.

    >>> [each.input_ids[0] for each in spread([Example([place], []) for place in range(7)], 3)]
    [0, 2, 4]
    """
    return examples if len(examples) <= most else [examples[place * len(examples) // most] for place in range(most)]


def collate(examples: Sequence[Example], pad_id: int, device: torch.device) -> Batch:
    """Pad the examples to the longest of them.

    >>> collate([Example([5, 6], [-100, 6]), Example([7], [-100])], 0, torch.device("cpu")).input_ids_BT
    tensor([[5, 6],
            [7, 0]])
    """
    width = max(len(example.input_ids) for example in examples)
    ids = [example.input_ids + [pad_id] * (width - len(example.input_ids)) for example in examples]
    labels = [example.labels + [IGNORED] * (width - len(example.labels)) for example in examples]
    return Batch(torch.tensor(ids, device=device), torch.tensor(labels, device=device))


def draws(
    examples: Sequence[Example] | Together, batch_size: int, first: int, count: int, seed: int
) -> Iterator[list[Example]]:
    """Yield batches number `first` to `first + count` of an endless shuffled reading of the examples.

    Every epoch has its own order, made from `seed`, and batches run across its end: a batch depends
    only on its number, so a resumed run reads on where the straight run would. Of more than `LISTED`
    examples no list of the order is held.
    """
    if isinstance(examples, Together):
        streams = [draws(own, examples.rows, first, count, own_seed) for own, own_seed in examples.each]
        yield from ([row for rows in drawn for row in rows] for drawn in zip(*streams, strict=True))
        return
    if len(examples) > LISTED:
        for number in range(first, first + count):
            places = range(number * batch_size, (number + 1) * batch_size)
            yield [examples[reckoned(place, len(examples), seed)] for place in places]
        return
    order, epoch = list[int](), -1
    for number in range(first, first + count):
        rows = []
        for position in range(number * batch_size, (number + 1) * batch_size):
            if position // len(examples) != epoch:
                epoch = position // len(examples)
                shuffled = torch.randperm(len(examples), generator=generator(seed, "epoch", epoch))
                order = shuffled.tolist()
            rows.append(examples[order[position % len(examples)]])
        yield rows
