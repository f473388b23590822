"""Calls go over a connection of a site's own where there is one, and by the engine where there is none."""

from __future__ import annotations

import socket
import threading
import time
from contextlib import contextmanager

import pytest

pytest.importorskip("nvflare", reason="the engine is not installed: pip install 'fedllm[federation]'")

from fedllm.core.errors import FedllmError
from fedllm.federation import dial, members, notes
from fedllm.federation.server import direct as module
from fedllm.federation.server.direct import directly
from fedllm.federation.site.front import Front
from fedllm.runtime.line import Aborted, Line, Unreachable, decode, encode
from tests.certified import client_context, made, port
from tests.flare_parts import until


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    return made(tmp_path_factory.mktemp("federation"), ["a", "b"])


class Sites:
    """Sites behind an engine's line, and by which way each was called."""

    def __init__(self, federation):
        self.ways, self.engine, self.aborted, self.answers = [], threading.local(), False, self.echo
        self.fronts = {
            name: Front(place / "kit", lambda data, name=name: self.answer(name, data))
            for name, place in federation.sites.items()
        }
        self.line = Line(self.call, lambda: list(self.fronts), self.check)

    def check(self):
        if self.aborted:
            raise Aborted("over")

    def call(self, site, head, body, seconds):
        self.check()
        self.engine.on = True
        try:
            return decode(self.fronts[site].answer(encode(head, body)))
        finally:
            self.engine.on = False

    def answer(self, site, data):
        self.ways.append((site, "engine" if getattr(self.engine, "on", False) else "direct"))
        return self.answers(site, data)

    @staticmethod
    def echo(site, data):
        head, body = decode(data)
        return encode({"site": site, **head}, body)


@contextmanager
def at_work(federation, tmp_path, monkeypatch, again=0.3):
    """Sites, and a line that is direct where it can be."""
    monkeypatch.setattr(module, "AGAIN", again)
    lobby = tmp_path / "lobby"
    lobby.mkdir()
    sites = Sites(federation)
    with port(federation, lobby), directly(sites.line, federation.folder, lobby) as line:
        yield sites, line


def reached(sites, line, site="a"):
    """Call a site until it is called directly."""

    def called():
        line.call(site, {"do": "echo"}, b"", 5.0)
        return sites.ways[-1] == (site, "direct")

    until(called, 10)


def test_the_first_call_is_the_engines_and_later_ones_are_direct_with_every_byte_as_it_was(
    federation, tmp_path, monkeypatch
):
    with at_work(federation, tmp_path, monkeypatch) as (sites, line):
        line.call("a", {"do": "echo"}, b"", 5.0)
        assert sites.ways[0] == ("a", "engine")
        for site in ("a", "b"):
            reached(sites, line, site)
        for size in (0, 1, 70_000, 5_000_000):
            body = bytes(range(256)) * (size // 256) + b"x" * (size % 256)
            for site in ("a", "b"):
                head, back = line.call(site, {"do": "echo", "n": size}, body, 5.0)
                assert (head["site"], head["n"], bytes(back)) == (site, size, body)
                assert sites.ways[-1] == (site, "direct")


def test_two_calls_at_once_go_two_ways(federation, tmp_path, monkeypatch):
    with at_work(federation, tmp_path, monkeypatch, again=0.0) as (sites, line):
        reached(sites, line)
        dialled = sites.fronts["a"].dialled.copy()
        first, second = threading.Event(), threading.Event()

        def answers(site, data):
            if decode(data)[0]["n"] == 1:
                first.set()
                assert second.wait(5)
            return sites.echo(site, data)

        sites.answers = answers
        caller = threading.Thread(target=line.call, args=("a", {"do": "echo", "n": 1}, b"", 5.0))
        caller.start()
        assert first.wait(5)
        assert line.call("a", {"do": "echo", "n": 2}, b"", 5.0)[0]["n"] == 2
        second.set()
        caller.join(5)
        assert sites.ways[-2:] == [("a", "direct"), ("a", "engine")]
        # Nobody was asked to dial for that, which would have cut the call under way.
        assert line.call("a", {"do": "echo", "n": 3}, b"", 5.0)[0]["n"] == 3
        assert sites.ways[-1] == ("a", "direct") and sites.fronts["a"].dialled == dialled


def test_a_connection_that_ends_costs_one_call_and_comes_back(federation, tmp_path, monkeypatch):
    with at_work(federation, tmp_path, monkeypatch) as (sites, line):
        reached(sites, line)
        (connection,) = sites.fronts["a"].dialled.values()
        connection.shutdown(2)
        with pytest.raises(Unreachable, match="a does not answer"):
            line.call("a", {"do": "echo"}, b"", 5.0)
        line.call("a", {"do": "echo"}, b"", 5.0)
        assert sites.ways[-1] == ("a", "engine")
        reached(sites, line)


def test_an_answer_is_waited_for_as_long_as_was_said_and_a_late_one_answers_nothing_else(
    federation, tmp_path, monkeypatch
):
    monkeypatch.setattr(module, "LOOK", 0.1)
    with at_work(federation, tmp_path, monkeypatch) as (sites, line):
        reached(sites, line)
        sites.answers = lambda site, data: (time.sleep(1.0), sites.echo(site, data))[1]
        begun = time.monotonic()
        with pytest.raises(Unreachable, match=r"no answer within 0\.3 s"):
            line.call("a", {"do": "echo", "n": 1}, b"", 0.3)
        assert time.monotonic() - begun < 0.9
        sites.answers = sites.echo
        time.sleep(1.0)
        for n in range(2, 6):
            assert line.call("a", {"do": "echo", "n": n}, b"", 5.0)[0]["n"] == n


def test_a_call_that_waits_ends_with_its_run(federation, tmp_path, monkeypatch):
    with at_work(federation, tmp_path, monkeypatch) as (sites, line):
        reached(sites, line)

        def answers(site, data):
            sites.aborted = True
            time.sleep(3)
            return sites.echo(site, data)

        sites.answers = answers
        begun = time.monotonic()
        with pytest.raises(Aborted):
            line.call("a", {"do": "echo"}, b"", 15.0)
        assert time.monotonic() - begun < 2
        with pytest.raises(Aborted):
            line.call("a", {"do": "echo"}, b"", 15.0)


@pytest.mark.parametrize("said", [b"rubbish that is no message", b"\xff\xff\xff\xff", (9).to_bytes(4, "big") + b"{"])
def test_an_answer_that_is_no_message_is_no_answer(federation, tmp_path, monkeypatch, said):
    with at_work(federation, tmp_path, monkeypatch, again=60.0) as (sites, line):
        reached(sites, line)
        sites.answers = lambda site, data: said
        with pytest.raises(Unreachable):
            line.call("a", {"do": "echo"}, b"", 5.0)
        sites.answers = sites.echo
        line.call("a", {"do": "echo"}, b"", 5.0)
        assert sites.ways[-1] == ("a", "engine")


def test_an_answer_that_is_too_long_is_never_read(federation, tmp_path, monkeypatch):
    monkeypatch.setattr(module, "LARGEST_ANSWER", 1000)
    with at_work(federation, tmp_path, monkeypatch, again=60.0) as (sites, line):
        reached(sites, line)
        with pytest.raises(Unreachable, match="more than 1000"):
            line.call("a", {"do": "echo"}, bytes(2000), 5.0)


def test_a_site_that_cannot_dial_is_called_by_the_engine_and_not_asked_again_soon(federation, tmp_path, monkeypatch):
    asked = []

    def cannot(kit, name):
        asked.append(name)
        raise FedllmError("The port does not lead to this run.")

    monkeypatch.setattr(dial, "dialled", cannot)
    with at_work(federation, tmp_path, monkeypatch) as (sites, line):
        for _ in range(5):
            line.call("a", {"do": "echo"}, b"", 5.0)
            time.sleep(0.1)
        assert sites.ways == [("a", "engine")] * 5 and len(asked) == 1


def test_only_this_runs_sites_are_taken_and_a_revoked_certificate_cuts_what_there_is(
    federation, tmp_path, monkeypatch, caplog
):
    with at_work(federation, tmp_path, monkeypatch, again=60.0) as (sites, line):
        reached(sites, line)
        (name,) = sites.fronts["a"].dialled
        # The administrator's certificate is of this federation too.
        with dialled_as_admin(federation, name) as peer:
            assert peer.recv(1) == b""
        assert "'admin@example.org' is no site of this run" in caplog.text
        line.call("a", {"do": "echo"}, b"", 5.0)
        assert sites.ways[-1] == ("a", "direct")
        own = members.issued(federation.folder, "a").serial_number
        members.put_revoked(federation.folder, serial=own)
        line.call("a", {"do": "echo"}, b"", 5.0)
        assert sites.ways[-1] == ("a", "engine")
        with dial.dialled(federation.sites["a"] / "kit", name) as peer:
            assert peer.recv(1) == b""
        assert "was revoked" in caplog.text
    notes.put(federation.folder / "revoked.json", {"names": [], "serials": []})


def dialled_as_admin(federation, name):
    """Ask for a run with the administrator's certificate."""
    host, at = dial.server_of(federation.sites["a"] / "kit")
    return client_context(federation, [name]).wrap_socket(socket.create_connection((host, at)), server_hostname=host)


def test_a_run_that_is_over_leaves_nothing_in_the_lobby_and_no_connection(federation, tmp_path, monkeypatch):
    with at_work(federation, tmp_path, monkeypatch) as (sites, line):
        reached(sites, line)
        (connection,) = sites.fronts["a"].dialled.values()
        assert list((tmp_path / "lobby").iterdir())
    until(lambda: connection.fileno() == -1, 5)
    assert not list((tmp_path / "lobby").iterdir())
    with pytest.raises(Aborted):
        sites.aborted = True
        line.call("a", {"do": "echo"}, b"", 1.0)


def test_a_name_that_no_run_has_is_not_dialled(federation, tmp_path, monkeypatch):
    with at_work(federation, tmp_path, monkeypatch) as (sites, _):
        front = sites.fronts["a"]
        for name in ("../x", "", None, 7, "ab" * 17):
            assert "32 hexadecimal digits" in decode(front.answer(encode({"do": "dial", "name": name})))[0]["error"]
        refused = decode(front.answer(encode({"do": "dial", "name": "00" * 16})))[0]["error"]
        assert refused.startswith("The server at 127.0.0.1:") or refused.startswith("The port 127.0.0.1:")
        assert not front.dialled
