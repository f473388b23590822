"""Every random choice has an address: the same one gives the same numbers, another one others."""

from __future__ import annotations

import torch
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.seeds import derive, generator

ADDRESS = st.lists(st.integers() | st.text(), max_size=4).map(tuple)


@given(st.integers(), ADDRESS)
def test_a_seed_has_63_bits_and_repeats(seed, address):
    assert derive(seed, *address) == derive(seed, *address)
    assert 0 <= derive(seed, *address) < 2**63
    assert torch.equal(
        torch.rand(3, generator=generator(seed, *address)), torch.rand(3, generator=generator(seed, *address))
    )


@given(st.integers(), ADDRESS, ADDRESS)
def test_other_addresses_give_other_seeds(seed, one, other):
    assert (derive(seed, *one) == derive(seed, *other)) == (one == other)


def test_what_looks_alike_is_told_apart():
    addresses = [("a", "b"), ("ab",), ("a", "", "b"), (1, 2), ("1", 2), (12,), ("a\x1fb",), ("a'\x1f'b",)]
    assert len({derive(0, *address) for address in addresses}) == len(addresses)
    assert derive(1, 2) != derive(12) and derive(0, 1) != derive(1, 0)


def test_seeds_stay_the_same_from_version_to_version():
    assert derive(0) == 4761921975702974394
    assert derive(0, "select", 3) == 1253080522994996137


def test_drawing_leaves_torchs_own_generator_alone():
    before = torch.random.get_rng_state()
    torch.rand(5, generator=generator(0, "x"))
    assert torch.equal(before, torch.random.get_rng_state())
