"""Bad networks: a slow and lossy link, a cable pulled during a transfer, strangers at the port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time

import pytest
import torch

from tests.integration.test_two_machines import RECIPE, SITES, adapter_or_model, federation, on_one_machine
from tests.integration.test_two_machines import prepare as prepare_tiny
from tests.networks import Slow, carried, cut, listening, mend, on
from tests.tiny import tiny_model

pytestmark = pytest.mark.slow
pytest.importorskip("nvflare", reason="the extra fedllm[federation] is not installed")


def prepare(place):
    """A model of some 10 MB whose weights are all trained, so that there is something to send."""
    prepare_tiny(place)
    tiny_model(layers=4, hidden=256).save_pretrained(place / "model")
    recipe = RECIPE.format(model=place / "model").replace('name = "lora"\nr = 2', 'name = "full"')
    (place / "recipe.toml").write_text(recipe + "[evaluate]\nalone = false\n")


def live(them, run="tiny"):
    return json.loads((them["server"].folder / "federation" / "runs" / run / "live.json").read_text())


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def ratios(counted, told):
    """The bytes that were counted down to a site and up from it, for each byte of the payload."""
    return counted.received / told["bytes_down"], counted.sent / told["bytes_up"]


def test_a_site_behind_a_slow_and_lossy_link_takes_part(tmp_path):
    prepare(tmp_path)
    with federation(tmp_path, {"c": Slow(0.1, 0.01, 20)}) as them, listening(SITES) as heard:
        began = {name: carried(name) for name in SITES}
        printed = them["server"].types("federation", "run", str(tmp_path / "recipe.toml"), seconds=1500)
        assert "round 2 of 2: 3 silos" in printed, printed
        sites = live(them)["sites"]
        for name in SITES:
            # A full frame has 66 bytes of headers for 1448 of data, and every one or two of them cost a frame with an
            # acknowledgement, of which each loss makes more and longer ones: above 5 % of whatever is sent.
            frames, streams = ratios(carried(name).since(began[name]), sites[name]), heard(name)
            print(f"{name}: payload {sites[name]}, frames {frames}, {streams}, {ratios(streams, sites[name])}")
            assert streams.missed == 0
            assert max(ratios(streams, sites[name])) < 1.05, name
            assert max(frames) < (1.2 if name == "c" else 1.1), name
        # No piece went twice: what was counted for the slow site is what was counted for the others.
        assert sites["c"]["bytes_down"] < 1.01 * sites["a"]["bytes_down"]
        far = adapter_or_model(them["server"].folder / "runs" / "tiny")
    assert same(adapter_or_model(on_one_machine(tmp_path)), far)


def test_a_cable_that_is_pulled_during_a_transfer_costs_a_piece_and_not_the_round(tmp_path):
    prepare(tmp_path)
    with federation(tmp_path, {"b": Slow(0.01, 0.0, 20)}) as them:
        begin = carried("b")

        def pull():
            """Pull b's cable in the middle of a large payload, twice."""
            for megabytes in (6, 20):
                while carried("b").since(begin).received < megabytes * 10**6:
                    time.sleep(0.05)
                cut("b")
                time.sleep(8)
                mend("b")

        puller = threading.Thread(target=pull, daemon=True)
        puller.start()
        printed = them["server"].types("federation", "run", str(tmp_path / "recipe.toml"), seconds=1500)
        assert "round 2 of 2: 3 silos" in printed, printed
        puller.join(1)
        sites = live(them)["sites"]
        print(f"b: payload {sites['b']}, frames {ratios(carried('b').since(begin), sites['b'])}")
        # Each pull costs a piece, and what was under way; pieces are 1 MiB at first, and as long as a second or so.
        assert sites["b"]["bytes_down"] < sites["a"]["bytes_down"] + 2 * (8 << 20)
        assert not puller.is_alive()
        far = adapter_or_model(them["server"].folder / "runs" / "tiny")
    assert same(adapter_or_model(on_one_machine(tmp_path)), far)


def test_garbage_at_the_port_breaks_nothing(tmp_path):
    prepare_tiny(tmp_path)
    shout = (
        "import socket, os, sys, time\n"
        "end = time.time() + 40\n"
        "while time.time() < end:\n"
        "    try:\n"
        "        s = socket.create_connection((sys.argv[1], 8002), 2)\n"
        "        s.settimeout(0.5)\n"
        "        s.sendall(os.urandom(200_000)); s.close()\n"
        "    except OSError: pass\n"
    )
    with federation(tmp_path) as them:
        stranger = subprocess.Popen(on("c", sys.executable, "-c", shout, "10.231.7.1"), env=dict(os.environ))
        printed = them["server"].types("federation", "run", str(tmp_path / "recipe.toml"))
        stranger.kill()
        stranger.wait()
        assert "round 2 of 2: 3 silos" in printed, printed


def test_with_a_delay_silos_train_while_their_fragments_cross_slow_links(tmp_path):
    prepare(tmp_path)
    recipe = (
        (tmp_path / "recipe.toml").read_text().replace("rounds = 2", "rounds = 6").replace("steps = 2", "steps = 40")
    )
    (tmp_path / "recipe.toml").write_text(recipe + "every = 6\n[share]\nname = 'fragments'\ncount = 2\n")
    seconds = {}
    with federation(tmp_path, dict.fromkeys(SITES, Slow(0.02, 0.0, 20))) as them:
        server = them["server"]
        for delay in (0, 1):
            name = f"delay-{delay}"
            how = ["--name", name, "--set", f"share.delay={delay}"]
            printed = server.types("federation", "run", str(tmp_path / "recipe.toml"), *how, seconds=1500)
            assert "round 6 of 6: 3 silos" in printed, printed
            events = [json.loads(line) for line in (server.folder / "runs" / name / "events.jsonl").open()]
            rounds = [event["seconds"]["train"] for event in events if event["event"] == "round"]
            seconds[delay] = sum(rounds)
            print(f"{name}: {rounds} s, {live(them, name)['sites']['a']}")
        far = adapter_or_model(server.folder / "runs" / "delay-1")
    assert same(adapter_or_model(on_one_machine(tmp_path, "share.delay=1")), far)
    assert seconds[1] < 0.9 * seconds[0]
