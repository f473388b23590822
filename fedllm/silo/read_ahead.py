"""The rows that a silo's next steps read, as tensors for another process, and there in the place of all its rows."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from fedllm.core.seeds import derive
from fedllm.core.types import Tensors
from fedllm.silo.examples import Example, draws


def rows_of(rows: Sequence[Example], batch_size: int, first: int, count: int, seed: int) -> dict[str, Tensor]:
    """Return the rows of `count` batches from number `first` on, each once; `seed` is the silo's.

    Row i has number `number_R[i]` and `length_R[i]` of the tokens in `ids_N` and `labels_N`.
    """
    batches = draws(range(len(rows)), batch_size, first, count, derive(seed, "order"))  # type: ignore[arg-type]
    numbers = sorted({int(number) for batch in batches for number in batch})  # type: ignore[call-overload]
    found = [rows[number] for number in numbers]
    return {
        "number_R": torch.tensor(numbers, dtype=torch.int64),
        "length_R": torch.tensor([len(row.input_ids) for row in found], dtype=torch.int64),
        "ids_N": torch.tensor([token for row in found for token in row.input_ids], dtype=torch.int64),
        "labels_N": torch.tensor([label for row in found for label in row.labels], dtype=torch.int64),
    }


class Ahead(Sequence[Example]):
    """As many rows as the silo has, of which only those are here that will be read."""

    def __init__(self, tensors: Tensors, count: int) -> None:
        """Take what `rows_of` made of a silo with `count` rows."""
        ends = tensors["length_R"].cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        ids, labels = tensors["ids_N"], tensors["labels_N"]
        self._rows = {
            number: Example(ids[start:end].tolist(), labels[start:end].tolist())
            for number, start, end in zip(tensors["number_R"].tolist(), starts, ends, strict=True)
        }
        self._count = count

    def __len__(self) -> int:
        return self._count

    def __getitem__(self, number: int) -> Example:  # type: ignore[override]
        return self._rows[number]
