"""The parts of secure aggregation against numbers by hand, published vectors, and brute force."""

from __future__ import annotations

import hashlib
import hmac
import math

import networkx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError, Refused
from fedllm.exchange.secure.fixed_point import grid, rounded, values_of
from fedllm.exchange.secure.graph import apart_chance, most_of, neighbours_of
from fedllm.exchange.secure.keys import agreed, pair_of, require_point, sealed, unsealed
from fedllm.exchange.secure.masks import CHUNK, Mask, masked, stream, words
from fedllm.exchange.secure.settings import Settings, circle, require_settings
from fedllm.exchange.secure.shares import joined, split


def test_agreement_is_x25519_and_hkdf_by_their_rfcs():
    """RFC 7748, section 6.1, and RFC 5869 done by hand on what it gives."""
    alice = bytes(range(32))
    bob = bytes.fromhex("5dab087e624a8a4b79e17f8b83800ee66f3bb1292618b6fd1c2f8b27ff88e0eb")
    assert pair_of(bob).public.hex() == "de9edb7d7b7dc1b4d35b61c2ece435373f8343c85b78674dadfc7e146f882b4f"
    one, other = pair_of(alice), pair_of(bob)
    assert agreed(one.private, other.public, b"x", "mask") == agreed(other.private, one.public, b"x", "mask")
    shared = bytes.fromhex("4a5d9d5ba4ce2de1728e3bf480350f25e07e21c947d19e3376f09b3c1e161742")
    told = bytes.fromhex("8520f0098930a754748b7ddcb43ef75a0dbf3a0d26381af4eba4a98eaa9b4e6a")
    key = hmac.new(b"x", shared, hashlib.sha256).digest()
    expected = hmac.new(key, b"fedllm secure mask\x01", hashlib.sha256).digest()
    assert agreed(bob, told, b"x", "mask") == expected


@pytest.mark.parametrize("bad", [bytes(32), bytes([1, *[0] * 31]), bytes([0xEC, *[0xFF] * 30, 0x7F])])
def test_points_of_low_order_are_no_keys(bad):
    with pytest.raises(Refused, match="bad point"):
        require_point(bad)


def test_masks_are_aes_256_in_counter_mode():
    # The cipher of a block of zeros under a key of zeros (AESAVS, GFSbox and KeySbox tables share it).
    assert stream(bytes(32)).update(bytes(16)).hex() == "dc95c078a2408989ad48a21492842087"


@pytest.mark.parametrize("kind", [np.uint16, np.uint32])
@pytest.mark.parametrize("size", [1, 1000, CHUNK // 4 + 3])
def test_a_mask_taken_off_leaves_what_was_there(kind, size):
    numbers = np.arange(size).astype(kind)
    before = numbers.copy()
    masked(numbers, [Mask(b"a" * 32, True), Mask(b"b" * 32, False)])
    made = [words(stream(key * 32), size, kind) for key in (b"a", b"b")]
    assert np.array_equal(numbers, before + made[0] - made[1])
    masked(numbers, [Mask(b"b" * 32, True), Mask(b"a" * 32, False)])
    assert np.array_equal(numbers, before)


def test_a_box_opens_with_its_key_about_what_it_was_sealed():
    box = sealed(b"k" * 32, b"p" * 64, b"about")
    assert len(box) == 92 and unsealed(b"k" * 32, box, b"about") == b"p" * 64
    for key, data, about in [
        (b"l", box, b"about"),
        (b"k", box, b"other"),
        (b"k", box[:-1] + bytes([box[-1] ^ 1]), b"about"),
    ]:
        with pytest.raises(Refused, match="was not sealed"):
            unsealed(key * 32, data, about)


@settings(max_examples=20, deadline=None)
@given(st.integers(2, 6), st.integers(0, 3), st.binary(min_size=32, max_size=32), st.randoms())
def test_any_shares_that_are_enough_bring_a_secret_back(threshold, more, secret, chance):
    shares = dict(enumerate(split(secret, threshold, threshold + more)))
    chosen = dict(chance.sample(sorted(shares.items()), threshold))
    assert joined(chosen, threshold, lambda found: found == secret) == secret


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([16, 32]),
    st.integers(3, 40),
    st.floats(1e-6, 1e6),
    st.lists(st.floats(-3, 3, width=32), min_size=1, max_size=8),
)
def test_whatever_silos_have_their_sum_does_not_wrap(bits, silos, largest, values):
    by = grid(bits, largest, silos)
    mine = (np.array(values) * largest).astype(np.float32)
    parts = [rounded(mine, by, 1.0, bytes([number]) * 32)[0] for number in range(silos)]
    total = np.sum(np.stack(parts), axis=0, dtype=parts[0].dtype)
    within = np.clip(mine.astype(np.float64), -largest, largest)
    assert np.abs(values_of(total, by) - silos * within).max() <= silos * by.step * (1 + 1e-9)


def test_what_lies_beyond_is_counted():
    by = grid(32, 1.0, 3)
    assert rounded(np.float32([0.5, 1.0, 1.0005, 1.5, -7.0]), by, 1.0, b"k" * 32)[1] == 2
    assert rounded(np.float32([0.5, 4.0]), by, 0.25, b"k" * 32)[1] == 0
    with pytest.raises(FedllmError, match="not finite"):
        rounded(np.float32([0.5, np.nan]), by, 1.0, b"k" * 32)
    with pytest.raises(FedllmError, match=r"secure\.bits = 32"):
        grid(16, 1.0, 3000)


@pytest.mark.parametrize(("count", "each"), [(6, 5), (12, 4), (30, 8), (101, 20)])
def test_the_graph_is_regular_and_bears_as_many_gone_as_it_says(count, each):
    graph = networkx.Graph(
        [(own, other) for own, near in enumerate(neighbours_of(count, each, b"c")) for other in near]
    )
    assert {degree for _, degree in graph.degree} == {each}
    assert networkx.node_connectivity(graph) == each and apart_chance(count, each, each - 1) == 0
    drawn = {tuple(map(tuple, neighbours_of(count, each, bytes([n])))) for n in range(8)}
    assert len(drawn) == (1 if each == count - 1 else 8)


def test_how_many_bad_ones_are_near_is_the_hypergeometric_tail():
    from scipy.stats import hypergeom

    for chance in (1e-3, 2.0**-40):
        found = most_of(10, 100, 20, chance)
        drawn = hypergeom(99, 10, 20)
        assert drawn.sf(found) <= chance < drawn.sf(found - 1)
    assert most_of(3, 10, 9, 1e-12) == 3 and most_of(0, 100, 20, 0.0) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(3, 120), st.integers(0, 10), st.integers(0, 10))
def test_every_circle_keeps_its_promises_or_is_refused(silos, drop_outs, colluding):
    try:
        now = circle(Settings(drop_outs=drop_outs, colluding=colluding), silos, silos)
    except FedllmError:
        return
    holders = now.neighbours + 1
    close = most_of(colluding, silos, now.neighbours, 2.0**-40 / silos)
    assert 2 * now.threshold > holders + close and now.threshold > close
    assert now.threshold <= holders - most_of(drop_outs, silos, now.neighbours, 2.0**-20 / silos)
    assert now.honest == silos - drop_outs - colluding >= 2
    if now.neighbours < silos - 1:
        gone = colluding + drop_outs
        assert gone < now.neighbours or silos * (gone / silos) ** (now.neighbours // 2) <= 2.0**-40


@pytest.mark.parametrize(
    ("said", "why"),
    [({"least": 2}, "at least 3"), ({"largest_weight": 0}, "at least 1"), ({"largest_value": 0.0}, "above 0")],
)
def test_settings_without_sense_are_sentences(said, why):
    with pytest.raises(FedllmError, match=why):
        require_settings(Settings(**said))
    assert math.isfinite(Settings().largest_weight)
