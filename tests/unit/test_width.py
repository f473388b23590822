"""How many clients train as one batch."""

from __future__ import annotations

import pytest
import torch

from fedllm.silo.width import cohort_width, fitting_tokens
from tests.tiny import tiny_model

CPU = torch.device("cpu")


@pytest.mark.parametrize(("rows", "tokens", "width"), [(2, 64, 8), (1, 16, 64), (8, 128, 1), (8, 512, 1)])
def test_small_clients_train_together_and_large_ones_alone(rows, tokens, width):
    assert cohort_width(tiny_model(), rows, tokens, CPU) == width


def test_what_fits_is_half_of_the_memory_by_hand():
    # 307 words x 10 bytes and 2 layers x 32 wide x 40 bytes are 5,630 bytes a token.
    assert fitting_tokens(tiny_model(), 2 * 5630 * 100) == 100
