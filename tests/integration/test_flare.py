"""FLARE as the engine, for real: a server and two sites as processes on loopback, with keys of their own."""

from __future__ import annotations

import json
import os
import signal
import socket
import ssl
import statistics
import time
from contextlib import closing

import pytest
import torch

pytest.importorskip("nvflare", reason="the engine is not installed: pip install 'fedllm[federation]'")

from fedllm.core.errors import FedllmError
from fedllm.federation import control, keys, members
from fedllm.federation.server import attempts, commands
from fedllm.runtime.flare import Wish, line_over
from fedllm.runtime.line import Aborted, decode, encode
from tests.flare_federation import USER, Federation
from tests.flare_parts import lives, processes, until


@pytest.fixture(scope="module")
def federation(tmp_path_factory):
    made = Federation(tmp_path_factory.mktemp("a site's place"), ["a", "b"])
    yield made
    made.close()
    until(lambda: not processes("nvflare", str(made.place)), 20)


def knock(port, certificate=None, key=None, version=ssl.TLSVersion.TLSv1_3):
    """Return how the port takes a peer: `in` when it waits for what the peer says, else why not."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode, context.maximum_version = False, ssl.CERT_NONE, version
    if certificate:
        context.load_cert_chain(certificate, key)
    with socket.create_connection(("127.0.0.1", port), timeout=5) as plain:
        try:
            with context.wrap_socket(plain) as peer:
                peer.settimeout(1.0)
                # In TLS 1.3 a peer learns only after its own handshake that it is refused.
                return "cut" if peer.recv(1) == b"" else "talks"
        except TimeoutError:
            return "in"
        except OSError as error:
            return str(error)


def files(folder, certificate, key):
    folder.mkdir()
    (folder / "c.crt").write_bytes(keys.pem(certificate))
    keys.write_key(folder / "c.key", key)
    return folder / "c.crt", folder / "c.key"


def test_a_run_goes_from_submission_to_its_end_with_every_byte_as_it_was(federation):
    body = torch.randn(300).to(torch.bfloat16).view(torch.uint8).numpy().tobytes()
    federation.submit("first", do="echo", hex=body.hex())
    until(lambda: federation.attempts("first"), 60)
    assert time.monotonic() - federation.begun < 40
    assert federation.ends("first")["state"] == "done"
    assert federation.attempts("first")[0]["sites"] == federation.attempts("first")[0]["expected"] == ["a", "b"]
    seconds = json.loads((federation.folder / "runs" / "first" / "echo.json").read_text())
    assert statistics.median(seconds) < 0.3


def test_the_port_takes_only_this_federations_certificates_and_only_by_tls_1_3(federation, tmp_path):
    startup = federation.place / "a" / "kit" / "startup"
    own = startup / "client.crt", startup / "client.key"
    until(lambda: control.status(federation.folder)["sites"]["a"]["connected"], 30)
    assert knock(federation.port, *own) == "in"
    assert "alert" in knock(federation.port, *own, version=ssl.TLSVersion.TLSv1_2)
    assert knock(federation.port) != "in"
    root, key = members.read_root(federation.folder), keys.read_key(federation.folder / "ca" / "root.key")
    mine = keys.new_key()
    expired = keys.issue(root, key, "a", mine.public_key(), days=-1)
    assert "expired" in knock(federation.port, *files(tmp_path / "old", expired, mine))
    other = keys.new_key()
    foreign = keys.issue(keys.new_root("demo", other), other, "a", mine.public_key())
    assert knock(federation.port, *files(tmp_path / "foreign", foreign, mine)) != "in"
    late = keys.issue(root, key, "b", mine.public_key())
    assert knock(federation.port, *files(tmp_path / "late", late, mine)) == "in"
    members.put_revoked(federation.folder, serial=late.serial_number)
    assert knock(federation.port, tmp_path / "late" / "c.crt", tmp_path / "late" / "c.key") != "in"
    for reason in ("UNSUPPORTED_PROTOCOL", "PEER_DID_NOT_RETURN", "expired", "revoked"):
        assert reason in federation.log(), reason


def test_garbage_and_silence_at_the_port_are_in_nobodys_way(federation):
    silent = [socket.create_connection(("127.0.0.1", federation.port)) for _ in range(20)]
    for noise in (b"GET / HTTP/1.1\r\n\r\n", os.urandom(5000), b"\x16\x03\x01\xff\xff" + bytes(70_000), b""):
        with closing(socket.create_connection(("127.0.0.1", federation.port))) as peer:
            peer.sendall(noise)
    context = ssl.create_default_context(cafile=federation.folder / "ca" / "root.crt")
    startup = federation.place / "b" / "kit" / "startup"
    context.load_cert_chain(startup / "client.crt", startup / "client.key")
    for noise in (os.urandom(5000), (2**31).to_bytes(4, "big") + bytes(100), bytes(16)):
        with (
            closing(socket.create_connection(("127.0.0.1", federation.port))) as plain,
            context.wrap_socket(plain, server_hostname="127.0.0.1") as peer,
        ):
            peer.sendall(noise)
    assert set(control.status(federation.folder / "admin")["sites"]) == {"a", "b"}
    for each in silent:
        each.close()


def test_the_administrators_kit_commands_through_the_port_and_a_sites_does_not(federation, tmp_path):
    kit = federation.folder / "admin"
    assert control.submit(kit, "far", 'do = "mend"\n') == ["a", "b"]
    with pytest.raises(FedllmError, match="There is a run 'far' already"):
        control.submit(kit, "far", 'do = "mend"\n')
    until(lambda: control.status(kit, "far")["runs"]["far"]["state"] == "failed", 60, 1)
    assert control.status(kit, "far")["runs"]["far"]["reason"] == "The disk is full; make room."
    assert (control.fetch(kit, "far", tmp_path / "got") / "recipe.toml").read_text() == 'do = "mend"\n'

    theirs = tmp_path / "theirs"
    (theirs / "startup").mkdir(parents=True)
    for name in ("client.crt", "client.key", "rootCA.pem"):
        (theirs / "startup" / name).write_bytes((federation.place / "a" / "kit" / "startup" / name).read_bytes())
    table = json.loads((kit / "startup" / "fed_admin.json").read_text())
    for user in ("a", USER):
        table["admin"]["username"] = user
        (theirs / "startup" / "fed_admin.json").write_text(json.dumps(table))
        with pytest.raises(FedllmError):
            control.submit(theirs, "stolen", 'do = "echo"\n')
    assert "stolen" not in control.status(kit)["runs"]


@pytest.mark.slow
def test_a_killed_relay_a_killed_server_and_a_site_that_returns_cost_an_attempt_each(federation):
    federation.submit("hold", do="hold")
    until(lambda: federation.attempts("hold"), 60)
    (relay,) = processes("worker_process", str(federation.place / "a" / "kit"))
    os.kill(relay, signal.SIGKILL)
    until(lambda: len(federation.attempts("hold")) == 2, 60)

    first = federation.attempts("hold")[-1]["pid"]
    (server,) = processes("server_train", str(federation.folder))
    os.kill(server, signal.SIGKILL)
    until(lambda: len(federation.attempts("hold")) == 3, 90)
    assert not lives(first)

    federation.daemons["b"].kill()
    federation.daemons["b"].wait()
    until(lambda: not processes("nvflare", str(federation.place / "b" / "kit")), 20)
    federation.start("b")
    until(lambda: len(federation.attempts("hold")) == 4, 90)
    assert federation.attempts("hold")[-1]["sites"] == ["a", "b"]
    (federation.folder / "runs" / "hold" / "go").touch()
    assert federation.ends("hold")["state"] == "done"


@pytest.mark.slow
def test_stop_reaches_the_sites_and_resume_goes_on(federation):
    federation.submit("stopped", do="hold")
    until(lambda: federation.attempts("stopped"), 60)
    control.stop(federation.folder, "stopped")
    assert federation.ends("stopped", 30)["state"] == "stopped"
    for site in ("a", "b"):
        assert json.loads((federation.place / site / "stopped.json").read_text())["run"] == "stopped"
    (federation.folder / "runs" / "stopped" / "go").touch()
    control.resume(federation.folder, "stopped")
    until(lambda: federation.state("stopped")["state"] == "done", 60)


def test_the_loop_is_stopped_before_the_sites_are_so_that_no_work_counts_as_failed(tmp_path):
    (tmp_path / "run.json").write_text('{"wanted": "stop"}')
    wish, told = Wish(tmp_path), []

    class Proxy:
        def __call__(self, timeout):
            return self

        def answer(self, data):
            told.append((decode(data)[0]["do"], wish.stopped.is_set()))
            return encode({})

    proxies = {"a": Proxy(), "b": Proxy()}
    wish.watch("run", line_over(proxies, lambda: False, lambda: False))
    assert told == [("stop", True)] * 2
    with pytest.raises(Aborted, match="was stopped"):
        line_over(proxies, lambda: False, wish.stopped.is_set).call("a", {"do": "wait"}, b"", 1.0)
    assert len(told) == 2


@pytest.mark.slow
def test_a_bug_is_tried_a_few_times_and_then_said(federation):
    federation.submit("bug", do="crash")
    ended = federation.ends("bug", 240)
    assert ended["state"] == "failed" and "RuntimeError: a bug" in ended["reason"]
    assert any("a bug" in line for line in control.logs(federation.folder, "bug"))
    assert len(federation.attempts("bug")) == attempts.TRIES


@pytest.mark.slow
def test_a_revoked_site_is_out_within_seconds_and_a_new_key_lets_it_in_again(federation):
    place = federation.place / "b"
    members.revoke(federation.folder, "b")
    until(lambda: not control.status(federation.folder)["sites"]["b"]["connected"], 30)
    federation.daemons["b"].terminate()
    federation.daemons["b"].wait(20)
    request = members.request("b", place)
    with pytest.raises(FedllmError, match="--again"):
        members.approve(federation.folder, request)
    (place / "kit" / "startup" / "client.key").unlink()
    members.join(members.approve(federation.folder, members.request("b", place), again=True), place)
    federation.start("b")
    until(lambda: control.status(federation.folder)["sites"]["b"]["connected"], 60)
    assert commands.answer(federation.folder, USER, {"do": "status"})["sites"]["b"]["revoked"] is False
