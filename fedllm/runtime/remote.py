"""The exchange with sites far away, over a line: all work at once, a few send or fetch, the lost are noted and left.

A site does a request as `begin`, `wait`... and keeps the reply until its round is over, so every call may be said
again: what is done is answered from record. Nothing here takes a site's word for anything.
"""

from __future__ import annotations

import hashlib
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from queue import Empty, SimpleQueue
from threading import Event, Lock, Semaphore, Thread
from typing import Any, NamedTuple

from fedllm.core.errors import Refused
from fedllm.core.types import Exchange, Reply, Request
from fedllm.runtime.errand import Packed, begun, finished, greet, promised
from fedllm.runtime.line import Aborted, Head, Line, Unreachable
from fedllm.runtime.meter import Traffic
from fedllm.runtime.spool import Stored, open_message, save_message
from fedllm.runtime.store import on_disk
from fedllm.runtime.transfer import FIRST, Ended, Link, fetch, plain, send
from fedllm.runtime.wire import reply_of

GRACE = 30.0
"""Seconds beyond its limit after which a call that has not come back is the engine's failure."""

ATTEMPTS = 10
"""Times that a site may lose a request or its tensors before the request is given up."""

LOST = f"it lost the request {ATTEMPTS} times"


LARGE = 1 << 25
"""Bytes above which what a site is sent, or sends, is of a large model: its reply is not read but stays in its file."""


class Arrived(NamedTuple):
    """A reply's file, the request that it answers, the bytes of that, and whom to tell when it is taken."""

    request: Request
    sent: int
    file: Stored
    taken: Event


def remote(
    line: Line,
    spool: Path,
    *,
    run: str,
    largest: int | Callable[[Request], int],
    note: Callable[[str, str], None],
    progress: Callable[[str, Mapping[str, Any]], None],
    patience: float = 60.0,
    stall: float = 1800.0,
    deadline: Callable[[Request], float] = lambda request: math.inf,
    parallel: int = 4,
) -> Exchange:
    """Ask sites over a line; the replies come as they arrive, and a site that fails is noted and sends none.

    `spool` is a folder of its own for the files on their way. `largest` is the most bytes that a reply's file may
    have. A site is given up when nothing moved for `patience` seconds (and one call), or when its work, though it
    answers, made no step for `stall` seconds; at the next exchange one short `ping` says whether it is back. Work that
    is not done after the request's `deadline`, in seconds from its begin, is late and not waited for. At most
    `parallel` sites send or fetch at once; one reply is in memory, and large ones stay on disk for as long as they are
    used. `note(site, sentence)` and `progress(site, what)` are called from threads, one at a time; bytes are counted
    over the exchange's life. What a request says of the next one is begun at the site before it has answered this one,
    so that it works while its reply is under way; asked in earnest, it has begun, or is done.

    Raises:
        Aborted: from the exchange, when the engine ended the run.
        FedllmError: from the exchange, when the spool cannot be written.
    """
    lost, had, totals, telling = set[str](), set[tuple[str, str]](), dict[str, Traffic](), Lock()
    pieces = dict[str, int]()

    def tell(site: str, state: str, numbers: Mapping[str, Any]) -> None:
        traffic = totals[site]
        with telling:
            progress(site, {"state": state, **numbers, "bytes_up": traffic.up, "bytes_down": traffic.down})

    def fail(site: str, problem: Exception) -> None:
        with telling:
            note(site, str(problem))
        tell(site, "failed", {})

    def begin(link: Link, work: Packed, slots: Semaphore) -> Head:
        """Have a site begin, and bring it the tensors if it has not got them."""
        # What is small goes at once; what is large goes when the site says that it has not got it.
        if work.stored.size <= FIRST and (link.site, work.stored.key) not in had:
            with slot(link, slots):
                send(link, work.stored)
        for _ in range(ATTEMPTS):
            answer = begun(link, work)
            if answer.get("state") != "missing":
                had.add((link.site, work.stored.key))
                return answer
            with slot(link, slots):
                send(link, work.stored)
        raise Refused(LOST)

    def obtain(link: Link, work: Packed, then: Packed | None, slots: Semaphore, arrived: SimpleQueue[Any]) -> None:
        """Get one reply's file and hold a place on the spool until it is taken."""
        request = work.request
        for _ in range(ATTEMPTS):
            answer, since = begin(link, work, slots), time.monotonic()
            if then:
                # What it says against that it says again when it is asked in earnest.
                with suppress(Refused):
                    begin(link, then, slots)
                then = None
            answer = finished(link, work, answer, since, stall, deadline(request))
            if answer["state"] == "done":
                break
        else:
            raise Refused(LOST)
        key, size = promised(answer, largest if isinstance(largest, int) else largest(request))
        with slot(link, slots):
            file = fetch(link, key, size, spool / f"reply-{file_name(link.site, key)}")
            item = Arrived(request, work.stored.size, file, Event())
            tell(link.site, "done", {})
            arrived.put(item)
            while not item.taken.wait(0.2):
                if link.ended.is_set():
                    raise Ended

    def serve(
        link: Link, work: Sequence[tuple[Packed, Packed | None]], slots: Semaphore, arrived: SimpleQueue[Any]
    ) -> None:
        """Ask one site for one reply after the other; whatever goes wrong beyond it ends the exchange."""
        try:
            for asked, then in work:
                try:
                    link.moved = time.monotonic()
                    if link.site in lost:
                        greet(link)
                        lost.discard(link.site)
                    obtain(link, asked, then, slots, arrived)
                except Refused as problem:
                    fail(link.site, problem)
                except Unreachable as problem:
                    lost.add(link.site)
                    fail(link.site, problem)
            arrived.put(None)
        except Ended:
            pass
        except BaseException as error:  # It is raised in the thread that reads the replies.
            arrived.put(error)
        finally:
            # What a link bears is known from one exchange to the next.
            pieces[link.site] = link.piece

    def exchange(requests: Sequence[Request]) -> Iterator[Reply]:
        ended, slots, arrived = Event(), Semaphore(parallel), SimpleQueue[Any]()
        known, files = set(line.sites()), dict[int, Stored]()
        work = dict[str, list[tuple[Packed, Packed | None]]]()

        def packed(request: Request) -> Packed:
            # The same tensors go to many sites: they are packed once.
            if id(request.tensors) not in files:
                path = spool / f"request-{len(files)}"
                with on_disk(path):
                    files[id(request.tensors)] = save_message(path, request.tensors, {})
            return Packed(request, files[id(request.tensors)])

        with on_disk(spool):
            spool.mkdir(parents=True, exist_ok=True)
        for request in requests:
            totals.setdefault(request.client, Traffic())
            if request.client not in known:
                fail(request.client, Refused("it is not among the sites of this run"))
                continue
            then = packed(request.then) if request.then else None
            work.setdefault(request.client, []).append((packed(request), then))
        links = [Link(line, site, run, patience, ended, tell, totals[site]) for site in work]
        for link in links:
            link.piece = pieces.get(link.site, link.piece)
        for link in links:
            Thread(target=serve, args=(link, work[link.site], slots, arrived), daemon=True).start()
        try:
            left = len(links)
            while left:
                item = next_item(arrived, links)
                if item is None:
                    left -= 1
                elif isinstance(item, BaseException):
                    raise item
                else:
                    # No name is held here: while the reply is used, nothing else should keep it alive.
                    yield from taken(item, fail)
            for path in spool.iterdir():
                path.unlink()
        finally:
            ended.set()

    return exchange


def taken(item: Arrived, fail: Callable[[str, Exception], None]) -> Iterator[Reply]:
    """Yield the reply in a file, or nothing if it is not one to this request; the file's name is gone then."""
    try:
        replies = [read_reply(item)]
    except Refused as problem:
        fail(item.request.client, problem)
        replies = []
    finally:
        item.file.path.unlink()
        item.taken.set()
    while replies:
        yield replies.pop()


def read_reply(item: Arrived) -> Reply:
    """Return the reply in a file; raise `Refused` unless it is one of the asked client in the asked round."""
    request = item.request
    try:
        tensors, head = open_message(item.file.path)
        reply = reply_of(tensors if max(item.sent, item.file.size) > LARGE else dict(tensors), head)
    except Refused as problem:
        raise Refused(plain(str(problem))) from problem
    if (reply.client, reply.round) != (request.client, request.round):
        raise Refused(f"it answers for '{plain(reply.client)}' in round {reply.round}, not for itself in this one")
    return reply


def file_name(*parts: str) -> str:
    """Return a name that is safe for a file, whatever the parts are."""
    return hashlib.sha256("/".join(parts).encode()).hexdigest()


def next_item(arrived: SimpleQueue[Any], links: Sequence[Link]) -> Any:
    """Return what a thread has to say; raise `Aborted` if the engine holds a call for longer than it may."""
    while True:
        with suppress(Empty):
            return arrived.get(timeout=1.0)
        for link in links:
            if (due := link.due) and time.monotonic() > due + GRACE:
                raise Aborted(f"The engine does not come back from a call to '{link.site}'; the run is started anew.")


@contextmanager
def slot(link: Link, slots: Semaphore) -> Iterator[None]:
    """Hold one of the places of those who send or fetch; the wait for it is not the site's."""
    while not slots.acquire(timeout=0.2):
        if link.ended.is_set():
            raise Ended
    link.moved = time.monotonic()
    try:
        yield
    finally:
        slots.release()
