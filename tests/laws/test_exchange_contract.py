"""What every exchange keeps, wherever its clients are: a runtime is ready when it passes these.

A maker is a context manager `maker(client, names, folder)` that gives an exchange with sites of these names which run
this client (a function that can be imported) on the silo `tests.fake_site.silo(name)`; `folder` is its own.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Request, Work
from fedllm.exchange.select import everyone
from fedllm.runtime.line import Aborted
from fedllm.runtime.local import local
from fedllm.runtime.remote import remote
from fedllm.runtime.spool import save_message
from fedllm.runtime.transfer import LARGEST
from fedllm.runtime.wire import CODES, reply_head
from tests.clients import TRANSFORMS, encoded, failing, pulling, slowly
from tests.fake_site import RUN, FakeSite, aborting, at, line_to, same, silo, stepping, unanswered, unreachable

NAMES = ["a", "bb", "ccc", "d-4"]


@contextmanager
def in_process(client, names, folder):
    yield local(client, silo, {})


@contextmanager
def over_a_line(client, names, folder):
    yield far(line_to({name: FakeSite(name, client, folder / name) for name in names}), folder)


def far(line, folder, told=None, notes=None, patience=5.0):
    """An exchange over a line; what is noted is an error unless there is a place for it."""

    def note(site, said):
        assert notes is not None, f"{site}: {said}"
        notes[site] = said

    return remote(
        line,
        folder / "spool",
        run=RUN,
        patience=patience,
        largest=1 << 30,
        note=note,
        progress=lambda site, what: told.update({site: what}) if told is not None else None,
    )


ENGINES = {"over FLARE": "engine", "over FLARE alone": "engine_alone"}
"""A server and four sites as processes of their own, which speak directly where they can, or by the engine alone."""

FLARE = [pytest.param(name, marks=pytest.mark.slow) for name in ENGINES]
"""Starting them takes longer than all other tests of this file."""


@pytest.fixture(scope="module")
def engine(tmp_path_factory):
    yield from working(tmp_path_factory.mktemp("flare"), "server")


@pytest.fixture(scope="module")
def engine_alone(tmp_path_factory):
    yield from working(tmp_path_factory.mktemp("flare"), "alone")


def working(place, server):
    pytest.importorskip("nvflare", reason="the engine is not installed: pip install 'fedllm[federation]'")
    from tests.flare_federation import Engine

    engine = Engine(place, NAMES, server)
    yield engine
    engine.close()


def over_flare(engine):
    @contextmanager
    def maker(client, names, folder):
        engine.ready(client, next(NUMBERS))
        yield far(engine.line, folder)

    return maker


NUMBERS = itertools.count()


@pytest.fixture(params=["in process", "over a line", *FLARE])
def made(request, tmp_path):
    maker = {"in process": in_process, "over a line": over_a_line}.get(request.param)
    maker = maker or over_flare(request.getfixturevalue(ENGINES[request.param]))
    return lambda client, names=NAMES: maker(client, names, tmp_path)


class LineSites:
    """Sites over a line, and what can befall them."""

    def __init__(self, client, folder):
        self.sites, self.faults = {name: FakeSite(name, client, folder / name) for name in NAMES}, {}
        self.line = line_to(self.sites, self.faults)

    def hush(self, site, seconds):
        end = time.monotonic() + seconds
        self.faults[site] = unreachable(lambda head: time.monotonic() < end)

    def stop(self):
        self.faults |= dict.fromkeys(NAMES, aborting(lambda head: True))

    def ran(self, site):
        return self.sites[site].ran


class FlareSites:
    """The same over FLARE."""

    def __init__(self, client, engine):
        engine.ready(client, next(NUMBERS))
        self.engine, self.line, self.stop = engine, engine.line, engine.stop

    def hush(self, site, seconds):
        self.engine.says(site, {"do": "hush", "seconds": seconds})

    def ran(self, site):
        return self.engine.says(site, {"do": "ran"})["ran"]


@pytest.fixture(params=["over a line", *FLARE])
def sites(request, tmp_path):
    def make(client):
        if request.param == "over a line":
            return LineSites(client, tmp_path)
        return FlareSites(client, request.getfixturevalue(ENGINES[request.param]))

    return make


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


def test_what_was_told_of_before_its_turn_gives_the_same_replies(made):
    rounds = [requests(of_every_type(number), number) for number in range(3)]
    for now, later in itertools.pairwise(rounds):
        # The last site hears of each round in its turn only.
        now[:-1] = [asked._replace(then=after) for asked, after in zip(now[:-1], later, strict=False)]
    straight = local(stepping, silo, {})
    with made(stepping) as exchange:
        for asked in rounds:
            ours, theirs = by_client(straight(asked)), by_client(exchange(asked))
            assert all(same(ours[request.client], theirs[request.client]) for request in asked)


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

    straight = ended(local(encoded, silo, {}))
    with made(encoded) as exchange:
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


def test_what_was_done_is_not_done_again(sites, tmp_path):
    these, asked = sites(stepping), requests(of_every_type(0))
    first = by_client(far(these.line, tmp_path)(asked))
    # As after a restart of the server: another exchange, the same requests.
    again = by_client(far(these.line, tmp_path)(asked))
    assert all(same(first[name], again[name]) for name in NAMES)
    assert all(len(these.ran(name)) == 1 for name in NAMES)
    assert float(by_client(far(these.line, tmp_path)(requests(of_every_type(1), 1)))["a"].scalars["loss"]) == 1.1


def test_work_that_fails_is_that_sites_alone_and_said(sites, tmp_path):
    notes = {}
    exchange = far(sites(failing).line, tmp_path, notes=notes)
    for number in range(2):
        assert by_client(exchange(requests(of_every_type(number), number))).keys() == set(NAMES) - {"bb"}
        assert notes.pop("bb") == "the text is gone" and not notes


def test_a_silent_site_is_left_out_and_taken_back(sites, tmp_path):
    these, notes = sites(stepping), {}
    exchange = far(these.line, tmp_path, notes=notes, patience=0.5)
    these.hush("ccc", 300)
    assert by_client(exchange(requests(of_every_type(0)))).keys() == set(NAMES) - {"ccc"}
    assert "nothing moved for" in notes.pop("ccc") and not notes
    # What is known to be lost is not waited for.
    begun = time.monotonic()
    assert by_client(exchange(requests(of_every_type(1), 1))).keys() == set(NAMES) - {"ccc"}
    assert time.monotonic() - begun < 30
    these.hush("ccc", 0)
    assert by_client(exchange(requests(of_every_type(2), 2))).keys() == set(NAMES)


def test_a_run_that_is_stopped_raises_and_gives_no_more_replies(sites, tmp_path):
    these, came = sites(slowly), []
    with pytest.raises(Aborted):
        for reply in far(these.line, tmp_path, patience=60)(requests(of_every_type(0))):
            came.append(reply.client)
            these.stop()
    assert came == ["a"]


class Recorded(FakeSite):
    """A site that has its reply ready, so that the memory of the process is that of the server."""

    def __init__(self, name, folder, tensors):
        super().__init__(name, None, folder)
        reply = Reply(name, 0, tensors, 1.0)
        self.reply = save_message(folder / "reply", tensors, reply_head(reply))
        self.reply.path.rename(folder / self.reply.key)

    def work(self, name, path, asked, event, said):
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
    exchange = far(line_to({name: Recorded(name, tmp_path / name, tensors) for name in NAMES}), tmp_path)
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
    exchange, begun = far(line_to(sites, cuts), tmp_path, told, patience=300.0), time.monotonic()
    assert by_client(exchange(requests(tensors, 0, NAMES[:2]))).keys() == set(NAMES[:2])
    assert time.monotonic() - begun < 60
    for name, pieces in (("a", 1), ("bb", 0)):
        assert payload < told[name]["bytes_down"] <= 1.05 * payload + pieces * LARGEST
        assert payload < told[name]["bytes_up"] <= 1.05 * payload + pieces * LARGEST
