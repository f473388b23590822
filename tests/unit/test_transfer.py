"""Files on their way: whole or refused, resumed where they were cut, given up only when nothing moves."""

from __future__ import annotations

import hashlib
import time
from threading import Event

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from fedllm.core.errors import Refused
from fedllm.runtime import transfer
from fedllm.runtime.line import Unreachable
from fedllm.runtime.meter import Traffic
from fedllm.runtime.spool import Stored
from fedllm.runtime.transfer import FIRST, LARGEST, SMALLEST, Ended, Link, ask, fetch, plain, send
from tests.fake_site import RUN, FakeSite, at, line_to, lying, slow, stepping, unanswered, unreachable

SIZE = 5 * FIRST // 2


@pytest.fixture
def site(tmp_path):
    return FakeSite("a", stepping, tmp_path / "site")


def link_to(site, fault=None, patience=5.0):
    told = []
    line = line_to({"a": site}, {"a": fault} if fault else None)
    return Link(line, "a", RUN, patience, Event(), lambda *said: told.append(said), Traffic())


def stored(path, size=SIZE, seed=0):
    data = hashlib.shake_128(bytes([seed])).digest(size)
    path.write_bytes(data)
    return Stored(path, hashlib.sha256(data).hexdigest(), size)


def test_a_file_goes_there_and_comes_back(site, tmp_path):
    link, file = link_to(site), stored(tmp_path / "file")
    send(link, file)
    assert (site.folder / file.key).read_bytes() == file.path.read_bytes()
    back = fetch(link, file.key, file.size, tmp_path / "back")
    assert back == Stored(tmp_path / "back", file.key, file.size)
    assert back.path.read_bytes() == file.path.read_bytes()
    assert SIZE <= link.traffic.down <= 1.01 * SIZE and SIZE <= link.traffic.up <= 1.01 * SIZE


def test_what_the_site_has_is_not_sent_again(site, tmp_path):
    file = stored(tmp_path / "file")
    send(link_to(site), file)
    again = link_to(site)
    send(again, file)
    assert again.traffic.down < 1000
    small = stored(tmp_path / "small", 100)
    send(link_to(site), small)
    # Asked once, sent in two pieces; asked once; sent at once.
    assert site.seen["put"] == 3 + 1 + 1


@pytest.mark.parametrize("fault", [unreachable, unanswered])
@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sets(st.integers(0, 6), max_size=4))
def test_a_cut_link_costs_one_piece_at_most(tmp_path_factory, fault, cuts):
    place = tmp_path_factory.mktemp("cut")
    site, file = FakeSite("a", stepping, place / "site"), stored(place / "file")
    there, back = link_to(site, fault(at(cuts))), link_to(site, fault(at(cuts)))
    send(there, file)
    fetch(back, file.key, file.size, place / "back")
    assert (place / "back").read_bytes() == file.path.read_bytes() == (site.folder / file.key).read_bytes()
    assert there.traffic.down <= 1.01 * SIZE + len(cuts) * 2 * FIRST
    assert back.traffic.up <= 1.01 * SIZE


def test_a_half_file_is_gone_on_with_by_the_next_process(site, tmp_path):
    file = stored(tmp_path / "file")
    with pytest.raises(Unreachable):
        send(link_to(site, unreachable(at(range(2, 10**6))), patience=0.2), file)
    assert 0 < (site.folder / file.key).stat().st_size < SIZE
    later = link_to(site)
    send(later, file)
    assert later.traffic.down < 0.7 * SIZE
    with pytest.raises(Unreachable):
        fetch(link_to(site, unreachable(at(range(1, 10**6))), patience=0.2), file.key, SIZE, tmp_path / "back")
    later = link_to(site)
    fetch(later, file.key, SIZE, tmp_path / "back")
    assert later.traffic.up < 0.7 * SIZE


def test_a_half_file_that_is_spoilt_is_fetched_anew(site, tmp_path):
    file = stored(tmp_path / "file")
    send(link_to(site), file)
    (tmp_path / "back").write_bytes(b"spoilt")
    assert fetch(link_to(site), file.key, SIZE, tmp_path / "back").path.read_bytes() == file.path.read_bytes()


def test_pieces_grow_on_a_quick_link_and_shrink_on_one_that_fails(site, tmp_path):
    quick = link_to(site)
    send(quick, stored(tmp_path / "large", 40 * FIRST))
    assert quick.piece == LARGEST
    bad = link_to(site, unreachable(at(range(5))))
    send(bad, stored(tmp_path / "small", 10, seed=1))
    assert bad.piece == 2 * SMALLEST


def test_patience_is_for_what_does_not_move_and_not_by_the_clock(site, tmp_path, monkeypatch):
    monkeypatch.setattr(transfer, "LARGEST", SMALLEST)
    link = link_to(site, slow(0.02), patience=0.15)
    link.piece = SMALLEST
    begun = time.monotonic()
    send(link, stored(tmp_path / "file"))
    assert time.monotonic() - begun > 4 * link.patience


@pytest.mark.parametrize(
    "fault",
    [unreachable(lambda head: True), lying("put", lambda head, body: ({"have": 0}, b""))],
    ids=["dead", "keeps nothing"],
)
def test_a_site_where_nothing_moves_is_given_up(site, tmp_path, fault):
    begun = time.monotonic()
    with pytest.raises(Unreachable, match="nothing moved for"):
        send(link_to(site, fault, patience=0.3), stored(tmp_path / "file"))
    assert 0.3 <= time.monotonic() - begun < 1.5


@pytest.mark.parametrize("have", [-1, SIZE + 1, None, True, 1.5, "1", [], 10**400])
def test_a_site_that_cannot_count_is_refused(site, tmp_path, have):
    with pytest.raises(Refused):
        send(link_to(site, lying("put", lambda head, body: ({"have": have}, b""))), stored(tmp_path / "file"))


@pytest.mark.parametrize(
    "change",
    [
        lambda head, body: (head, body[:-1]),
        lambda head, body: (head, bytes(body) + b"x"),
        lambda head, body: (head, b""),
        lambda head, body: (head, bytes(len(body))),
        lambda head, body: ({}, body),
        lambda head, body: ({"size": SIZE + 1}, body),
        lambda head, body: ({"error": "no such reply"}, b""),
        lambda head, body: ({"error": ["no"], "rule": 5}, b""),
    ],
)
def test_bytes_that_are_not_the_promised_ones_are_refused(site, tmp_path, change):
    file = stored(tmp_path / "file")
    send(link_to(site), file)
    with pytest.raises(Refused):
        fetch(link_to(site, lying("get", change)), file.key, SIZE, tmp_path / "back")


def test_a_file_with_another_sha256_is_refused_by_the_site(site, tmp_path):
    file = stored(tmp_path / "file")
    with pytest.raises(Refused, match="sha256"):
        send(link_to(site), file._replace(key="0" * 64))


def test_an_exchange_that_is_over_asks_nothing(site):
    link = link_to(site)
    link.ended.set()
    with pytest.raises(Ended):
        ask(link, {"do": "ping"})
    assert not site.seen


def test_what_a_peer_says_is_shown_as_one_short_line():
    assert plain("a\nb\x1b[31mc") == "a b [31mc"
    assert len(plain("x" * 10**6)) == 300
    assert (plain(5), plain(None), plain({})) == ("5", "NoneType", "dict")
