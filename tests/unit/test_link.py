"""Seconds over links, worked out by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedllm.core.errors import FedllmError
from fedllm.runtime.link import (
    Load,
    all_reduce_seconds,
    data_parallel_seconds,
    link,
    links_of,
    rate,
    round_seconds,
    spent,
)

MEGABYTE = 10**6


def test_a_transfer_by_hand():
    # 100 Mbit/s are 12.5 MB/s: 25 MB down take 2 s, 50 MB up at 40 Mbit/s 10 s, each 20 ms more; 3 s of compute.
    home = link(mbit=100, up=40, ms=20)
    load = Load(up=50 * MEGABYTE, down=25 * MEGABYTE, seconds=3.0)
    assert spent(home, load) == pytest.approx((3.0, 12.04, 15.04))
    assert spent(home, load, overlap=True) == pytest.approx((3.0, 12.04, 12.04))
    assert spent(home._replace(slowdown=5.0), load, overlap=True) == pytest.approx((15.0, 12.04, 15.0))


def test_nothing_sent_takes_no_latency():
    assert spent(link(), Load(0, 0, 1.5)) == (1.5, 0.0, 1.5)


def test_loss_by_hand():
    # 1460 B / 0.04 s * sqrt(1.5 / 0.0001) = 36,500 * 122.474 = 4.47 MB/s, of 12.5 that the wire has.
    lossy = link(mbit=100, ms=20, loss=1e-4)
    assert rate(lossy.up, lossy) == pytest.approx(4_470_319, rel=1e-6)
    # At 10 Mbit/s = 1.25 MB/s the wire is the slower of the two.
    assert rate(10, lossy) == 1.25e6
    # Four times the loss or twice the latency halve the speed.
    assert rate(1e6, lossy) == pytest.approx(2 * rate(1e6, lossy._replace(loss=4e-4)))
    assert rate(1e6, lossy) == pytest.approx(2 * rate(1e6, lossy._replace(ms=40)))


def test_a_round_is_as_long_as_its_slowest_silo():
    links = {"a": link(), "b": link(mbit=10), "c": link(slowdown=30)}
    load = Load(MEGABYTE, MEGABYTE, 1.0)
    # 1 MB each way: 0.16 s at 100 Mbit/s, 1.6 at 10; with two latencies of 20 ms and one second of compute.
    assert round_seconds(links, {"a": load}) == pytest.approx(1.2)
    assert round_seconds(links, {"a": load, "b": load}) == pytest.approx(2.64)
    assert round_seconds(links, dict.fromkeys(links, load)) == pytest.approx(30.2)
    assert round_seconds(links, {}) == 0.0


def test_a_ring_by_hand():
    # Four silos and 100 MB: 6 steps of 25 MB at the slowest 50 Mbit/s = 6.25 MB/s are 24 s, and 6 x 30 ms.
    links = {"a": link(), "b": link(up=50, down=80), "c": link(ms=30), "d": link()}
    assert all_reduce_seconds(links, 100 * MEGABYTE) == pytest.approx(24.18)
    # 2 (M - 1) / M of the bytes through the slowest link.
    assert all_reduce_seconds(links, 100 * MEGABYTE) == pytest.approx(2 * 3 / 4 * 100 / 6.25 + 6 * 0.03)
    assert all_reduce_seconds({"a": link()}, MEGABYTE) == 0.0


def test_data_parallel_training_by_hand():
    # 1 M parameters are 4 MB: 2 steps of 2 MB at 12.5 MB/s and 20 ms are 0.36 s; 30 steps and 6 s of compute.
    links = {"a": link(), "b": link(slowdown=3.0)}
    loads = {"a": Load(1, 1, 6.0), "b": Load(1, 1, 2.0)}
    assert data_parallel_seconds(links, loads, 10**6, 30) == pytest.approx(6 + 30 * 0.36)
    assert data_parallel_seconds(links, loads, 10**6, 30, overlap=True) == pytest.approx(30 * 0.36)
    # On its own a silo sends nothing.
    assert data_parallel_seconds(links, {"a": loads["a"]}, 10**6, 30) == pytest.approx(6.0)
    assert data_parallel_seconds(links, {}, 10**6, 30) == 0.0


def test_what_a_round_saves_grows_with_its_steps():
    # The claim of low-communication training: over one slow link the bytes go down by the steps of a round.
    links = {name: link(mbit=100, ms=0) for name in "abcd"}
    size = 4 * 10**7
    loads = {name: Load(size, size, 0.0) for name in links}
    for steps in (1, 30, 100):
        assert data_parallel_seconds(links, loads, 10**7, steps) == pytest.approx(steps * 2 * 3 / 4 * size / 12.5e6)
    assert round_seconds(links, loads) == pytest.approx(2 * size / 12.5e6)


LINKS = st.builds(link, mbit=st.floats(1, 1e4), ms=st.floats(1, 500), loss=st.floats(0, 0.1), slowdown=st.floats(1, 9))
LOADS = st.builds(Load, st.integers(0, 10**9), st.integers(0, 10**9), st.floats(0, 1e4))


@given(st.lists(st.tuples(LINKS, LOADS), min_size=1, max_size=5), LOADS)
def test_more_to_do_or_a_worse_link_never_makes_a_round_shorter(silos, more):
    links = {f"{n}": each for n, (each, _) in enumerate(silos)}
    loads = {f"{n}": load for n, (_, load) in enumerate(silos)}
    whole = round_seconds(links, loads)
    assert round_seconds(links, loads, overlap=True) <= whole
    assert round_seconds(links, {**loads, "0": Load(*(a + b for a, b in zip(loads["0"], more, strict=True)))}) >= whole
    for worse in ({"up": links["0"].up / 2}, {"ms": links["0"].ms * 2}, {"loss": links["0"].loss * 2 + 1e-3}):
        slower = {**links, "0": links["0"]._replace(**worse)}
        assert round_seconds(slower, loads) >= whole
        assert data_parallel_seconds(slower, loads, 10**6, 7) >= data_parallel_seconds(links, loads, 10**6, 7)


@pytest.mark.parametrize(
    ("given_link", "reason"),
    [
        ({"mbit": 0}, "up is 0; it must be above 0"),
        ({"down": -3}, "down is -3; it must be above 0"),
        ({"ms": -1}, "ms is -1; it must be at least 0"),
        ({"loss": 1.0}, "loss is 1;"),
        ({"loss": float("nan")}, "loss is nan"),
        ({"slowdown": 0}, "slowdown is 0; it must be above 0"),
        ({"mbit": float("inf")}, "up is inf"),
        ({"loss": 0.1, "ms": 0}, "ms is 0; set ms"),
    ],
)
def test_numbers_that_no_link_has_are_refused(given_link, reason):
    with pytest.raises(FedllmError, match=f"links: .*{reason}"):
        link(**given_link)


def test_a_silo_says_only_what_is_its_own():
    default = {"mbit": 100, "up": 40, "ms": 10}
    found = links_of(["a", "b", "c"], default, {"a": {"mbit": 20}, "b": {"ms": 80, "slowdown": 5}})
    assert found == {
        "a": link(mbit=20, ms=10),
        "b": link(mbit=100, up=40, ms=80, slowdown=5),
        "c": link(mbit=100, up=40, ms=10),
    }
    assert links_of(["a"], {}, {}) == {"a": link()}


@pytest.mark.parametrize(
    ("default", "silos", "reason"),
    [
        ({"mbits": 10}, {}, r"links\.default\.mbits is not a setting of a link; did you mean 'mbit'"),
        ({}, {"a": {"speed": 10}}, r"links\.silos\.a\.speed is not a setting"),
        ({"ms": "20 ms"}, {}, r"links\.default\.ms is '20 ms'; it must be a number"),
        ({}, {"hospitalb": {}}, r"links\.silos\.hospitalb is not a silo of this run; did you mean 'hospital_b'"),
        ({}, {"a": {"mbit": 0}}, "links: up is 0"),
    ],
)
def test_a_table_that_says_something_else_is_refused(default, silos, reason):
    with pytest.raises(FedllmError, match=reason):
        links_of(["a", "hospital_b"], default, silos)
