"""Noise comes from a secret, is the same again for the same question, and lies with its value on one grid."""

from __future__ import annotations

import math

import pytest
import torch
from scipy import stats

from fedllm.core.errors import FedllmError
from fedllm.core.noise import BLOCK, digest, fresh_secret, grid_of, key_of, normals, uniform, with_noise

KEY = b"k" * 32


def drawn(count, key=KEY):
    return torch.cat(list(normals(key, count)))


def test_normals_are_normal():
    values = drawn(200_000)
    # Four standard errors of each moment.
    assert abs(float(values.mean())) < 4 / math.sqrt(200_000)
    assert abs(float(values.var()) - 1) < 4 * math.sqrt(2 / 200_000)
    assert stats.kstest(values.numpy(), "norm").pvalue > 1e-3
    halves = torch.stack([values[:100_000], values[100_000:]])
    assert abs(float(torch.corrcoef(halves)[0, 1])) < 4 / math.sqrt(100_000)


def test_uniforms_are_uniform_and_below_one():
    values = uniform(KEY, 100_000)
    assert float(values.min()) >= 0 and float(values.max()) < 1
    assert stats.kstest(values.numpy(), "uniform").pvalue > 1e-3


def test_a_longer_draw_begins_with_the_shorter_one():
    assert torch.equal(drawn(BLOCK + 7)[: BLOCK - 3], drawn(BLOCK - 3))


def test_another_address_has_other_noise_and_the_same_one_the_same():
    one, other = (key_of(KEY, "noise", number) for number in (1, 2))
    assert torch.equal(drawn(100, one), drawn(100, key_of(KEY, "noise", 1)))
    assert abs(float(torch.corrcoef(torch.stack([drawn(10_000, one), drawn(10_000, other)]))[0, 1])) < 0.04
    # A part ends where it ends: two addresses are not joined to one.
    assert key_of(KEY, "ab", "c") != key_of(KEY, "a", "bc") and key_of(KEY, 1) != key_of(KEY, "1")


def test_two_secrets_have_nothing_in_common():
    assert fresh_secret() != fresh_secret() and len(fresh_secret()) == 32
    with pytest.raises(ValueError, match="32 bytes"):
        key_of(b"short", 1)


def test_noise_has_its_standard_deviation_and_mean_zero():
    values = {"a": torch.full((300, 500), 3.0), "b": torch.zeros(50_000)}
    noised = with_noise(values, 0.25, KEY)
    for name, value in values.items():
        off = (noised[name] - value).double()
        assert abs(float(off.mean())) < 4 * 0.25 / math.sqrt(off.numel())
        assert float(off.std()) == pytest.approx(0.25, rel=4 / math.sqrt(2 * off.numel()))
    assert not torch.equal(noised["a"].flatten()[:100] - 3, noised["b"][:100])
    assert values["a"].unique().tolist() == [3.0], "inputs are not changed"


def test_what_comes_out_lies_on_the_grid_before_it_is_rounded_to_float32():
    from fedllm.core.noise import on_grid

    step = grid_of(0.3)
    values = torch.randn(1000, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    before = values.clone()
    on_grid(values, 0.3 * drawn(1000), step)
    assert torch.equal(values / step, (values / step).round())
    # The value's own lowest bits are gone: two values within half a step give the same result.
    near = before.clone()
    near = (near / step).round() * step
    on_grid(near, 0.3 * drawn(1000), step)
    assert torch.equal(near, values)


def test_noise_on_short_floats_is_refused():
    with pytest.raises(FedllmError, match=r"'w' is torch.bfloat16; keep what is trained in float32"):
        with_noise({"w": torch.zeros(2, dtype=torch.bfloat16)}, 1.0, KEY)


@pytest.mark.parametrize("deviation", [0.0, -1.0, math.nan, math.inf])
def test_no_noise_is_not_noise(deviation):
    with pytest.raises(ValueError, match="standard deviation above 0"):
        with_noise({"w": torch.zeros(2)}, deviation, KEY)


def test_a_digest_tells_names_shapes_and_the_last_bit_apart():
    base = {"a": torch.zeros(4)}
    others = [
        {"b": torch.zeros(4)},
        {"a": torch.zeros(2, 2)},
        {"a": torch.zeros(4, dtype=torch.bfloat16)},
        {"a": torch.tensor([0, 0, 0, 1e-45])},
    ]
    assert len({digest(each) for each in [base, *others]}) == 5
    assert digest(base) == digest({"a": torch.zeros(8)[::2]})
