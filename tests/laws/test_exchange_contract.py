"""What every exchange keeps, wherever its clients are: a runtime is ready when it passes these.

A maker is a context manager `maker(client, names, folder)` that gives an exchange with sites of these names which run
this client (a function that can be imported) on the silo `tests.fake_site.silo(name)`; `folder` is its own.
"""

from __future__ import annotations

import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.round import averaging, encoding
from fedllm.core.types import Reply, Request, Work
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.select import everyone
from fedllm.exchange.top_k import top_k
from fedllm.runtime.local import local
from fedllm.runtime.remote import remote
from fedllm.runtime.spool import save_message
from fedllm.runtime.transfer import LARGEST
from fedllm.runtime.wire import CODES, reply_head
from tests.fake_site import RUN, FakeSite, at, line_to, same, silo, stepping, unanswered, unreachable

NAMES = ["a", "bb", "ccc", "d-4"]


@contextmanager
def in_process(client, names, folder):
    yield local(client, silo, {})


@contextmanager
def over_a_line(client, names, folder):
    yield far({name: FakeSite(name, client, folder / name) for name in names}, folder)


def far(sites, folder, faults=None, told=None):
    def note(site, said):
        raise AssertionError(f"{site}: {said}")

    return remote(
        line_to(sites, faults),
        folder / "spool",
        run=RUN,
        patience=5.0,
        largest=1 << 30,
        note=note,
        progress=lambda site, what: told.update({site: what}) if told is not None else None,
    )


MAKERS = {"in process": in_process, "over a line": over_a_line}


@pytest.fixture(params=list(MAKERS))
def made(request, tmp_path):
    return lambda client, names=NAMES: MAKERS[request.param](client, names, tmp_path)


def of_every_type(seed):
    draw = torch.Generator().manual_seed(seed)
    tensors = {}
    # Not in the order in which a file would have them.
    for dtype in reversed(CODES):
        values = torch.randn((3, 5), generator=draw) * 20
        tensors[f"{dtype}"] = values > 0 if dtype == torch.bool else values.abs().to(dtype)
    return tensors | {"none": torch.zeros(0, 4), "one": torch.tensor(2.5), "strided": torch.randn(4, 6).T}


def requests(tensors, number=0, names=NAMES):
    return [Request(name, number, "train", tensors, {"lr": 0.1}) for name in names]


def by_client(replies):
    found = list(replies)
    assert len({reply.client for reply in found}) == len(found)
    return {reply.client: reply for reply in found}


def test_replies_are_those_of_local_bit_for_bit_round_after_round(made):
    straight = local(stepping, silo, {})
    with made(stepping) as exchange:
        for number in range(3):
            asked = requests(of_every_type(number), number)
            ours, theirs = by_client(straight(asked)), by_client(exchange(asked))
            assert theirs.keys() == set(NAMES)
            assert all(same(ours[name], theirs[name]) for name in NAMES)


def test_the_order_of_the_requests_leaves_no_trace(made):
    asked = requests(of_every_type(0))
    straight = by_client(local(stepping, silo, {})(asked))
    with made(stepping) as exchange:
        assert all(same(straight[reply.client], reply) for reply in exchange(asked[::-1]))


def test_only_those_that_are_asked_answer(made):
    with made(stepping) as exchange:
        assert list(exchange([])) == []
        assert [reply.client for reply in exchange(requests(of_every_type(0), 0, ["bb"]))] == ["bb"]


def test_each_site_gets_its_own_tensors(made):
    asked = [Request(name, 0, "train", {"x": torch.full((3,), float(n))}) for n, name in enumerate(NAMES)]
    straight = by_client(local(stepping, silo, {})(asked))
    with made(stepping) as exchange:
        theirs = by_client(exchange(asked))
    assert all(same(straight[name], theirs[name]) for name in NAMES)


def test_two_requests_to_one_site_are_done_in_their_order(made):
    asked = [Request("a", 0, op, {"x": torch.ones(2)}) for op in ("open", "train", "evaluate")]
    straight = list(local(stepping, silo, {})(asked))
    with made(stepping) as exchange:
        theirs = list(exchange(asked))
    assert all(same(one, other) for one, other in zip(straight, theirs, strict=True))


def test_what_is_sent_is_not_touched(made):
    tensors = of_every_type(0)
    copies = {name: value.clone() for name, value in tensors.items()}
    with made(stepping) as exchange:
        list(exchange(requests(tensors)))
    assert all(torch.equal(tensors[name], copies[name]) for name in copies)


def test_an_exchange_that_was_closed_early_serves_the_next_round(made):
    with made(stepping) as exchange:
        replies = exchange(requests(of_every_type(0)))
        next(replies)
        replies.close()
        assert by_client(exchange(requests(of_every_type(1), 1))).keys() == set(NAMES)


def pulling(request, own):
    """A client whose update depends on its name and on all that it was sent."""
    tensors = {name: value * 0.1 + len(own.name) for name, value in request.tensors.items()}
    return Reply(own.name, request.round, tensors, float(len(own.name))), {}


TRANSFORMS = [top_k(0.3), cast(), clip(0.7)]
ENCODED = encoding(pulling, TRANSFORMS)


def test_three_rounds_of_averaging_give_the_bits_that_local_gives(made):
    algorithm = averaging(work=Work(pulling), select=everyone(NAMES), aggregate=mean(), transforms=TRANSFORMS)
    draw = torch.Generator().manual_seed(0)
    start = {f"layer {n}": torch.randn(13, 7 + n, generator=draw) for n in reversed(range(8))}

    def ended(exchange):
        state = algorithm.init(start)
        for _ in range(3):
            state, report = algorithm.server(state, exchange)
            assert report["clients"] == len(NAMES)
        return state.params

    straight = ended(local(ENCODED, silo, {}))
    with made(ENCODED) as exchange:
        theirs = ended(exchange)
    assert all(torch.equal(straight[name], theirs[name]) for name in start)


def test_a_reply_is_not_kept_when_the_next_one_comes(made):
    alive = weakref.WeakSet()
    with made(stepping) as exchange:
        replies = exchange(requests({"x": torch.ones(1000)}))
        while (reply := next(replies, None)) is not None:
            alive.add(reply.tensors["x"])
            del reply
            assert len(alive) <= 1


LARGE = [20, pytest.param(500, marks=pytest.mark.slow)]


def large(megabytes):
    draw = torch.Generator().manual_seed(0)
    return {f"{n}": torch.randn(megabytes * 10**6 // 8, generator=draw).to(torch.bfloat16) for n in range(4)}


@pytest.mark.parametrize("megabytes", LARGE)
def test_a_large_payload_crosses_whole(made, megabytes):
    tensors = large(megabytes)
    straight = local(stepping, silo, {})
    with made(stepping) as exchange:
        for reply in exchange(requests(tensors, 0, NAMES[:2])):
            (ours,) = straight(requests(tensors, 0, [reply.client]))
            assert same(ours, reply)
            del ours, reply


class Recorded(FakeSite):
    """A site that has its reply ready, so that the memory of the process is that of the server."""

    def __init__(self, name, folder, tensors):
        super().__init__(name, None, folder)
        reply = Reply(name, 0, tensors, 1.0)
        self.reply = save_message(folder / "reply", tensors, reply_head(reply))
        self.reply.path.rename(folder / self.reply.key)

    def work(self, name, path, asked):
        event, said = self.done[name]
        said |= {"state": "done", "key": self.reply.key, "size": self.reply.size}
        event.set()


def anonymous():
    """Bytes of this process's memory that no file stands behind."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("no /proc on this system")
    return int(status.read_text().split("RssAnon:")[1].split()[0]) * 1024


@pytest.mark.parametrize("megabytes", LARGE)
def test_the_memory_is_that_of_one_reply_and_some_pieces(tmp_path, megabytes):
    tensors = large(megabytes)
    exchange = far({name: Recorded(name, tmp_path / name, tensors) for name in NAMES}, tmp_path)
    before, most, over = anonymous(), [0], threading.Event()

    def watch():
        while not over.wait(0.005):
            most.append(anonymous())

    watcher = threading.Thread(target=watch)
    watcher.start()
    count = 0
    for reply in exchange(requests(tensors)):
        count += 1
        assert reply.tensors.keys() == tensors.keys()
        del reply
    over.set()
    watcher.join()
    # Each of the four places may hold a piece in a few copies.
    assert count == len(NAMES)
    assert max(most) - before <= 1.1 * megabytes * 10**6 + 4 * 5 * LARGEST


@pytest.mark.parametrize("fault", [unreachable, unanswered])
def test_a_cut_link_goes_on_where_it_was(tmp_path, fault):
    tensors, told = large(20), {}
    payload = sum(value.nbytes for value in tensors.values())
    sites = {name: FakeSite(name, stepping, tmp_path / name) for name in NAMES[:2]}
    # Once in the midst of what is sent and once of what is fetched; the other site sees nothing of it.
    put, get = at({3}, "put"), at({1}, "get")
    cuts = {"a": fault(lambda head: put(head) or get(head))}
    exchange, begun = far(sites, tmp_path, cuts, told), time.monotonic()
    assert by_client(exchange(requests(tensors, 0, NAMES[:2]))).keys() == set(NAMES[:2])
    assert time.monotonic() - begun < 5
    for name, pieces in (("a", 1), ("bb", 0)):
        assert payload < told[name]["bytes_down"] <= 1.05 * payload + pieces * LARGEST
        assert payload < told[name]["bytes_up"] <= 1.05 * payload + pieces * LARGEST
