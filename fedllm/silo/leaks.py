"""What a text that leaves a silo may not hold: word sequences of the silo's own text, and personal data.

Words are compared without case and punctuation. What the server sent itself is no secret from it. A sequence shorter
than the limit passes, and so does what is said in other words: this guards against copies, not against meaning.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from typing import Any, Literal, NamedTuple

from fedllm.core.errors import FedllmError, Refused
from fedllm.core.texts import as_tensors, texts_in
from fedllm.core.types import Client, Reply, Request, Silo, Tensors

WORD = re.compile(r"\w+")
MARK = "[...]"
"""What stands in the place of words that may not leave; it has no word itself."""

Hide = Callable[[str], tuple[str, int]]
"""From a text to the text without personal data, and how many places had some."""


class Guard(NamedTuple):
    """How texts are looked through before they leave."""

    n: int = 8
    """Words in a row that are a copy; 0 looks for none."""
    action: Literal["redact", "block"] = "redact"
    """Take the words out, or the whole text."""
    hide: Hide | None = None


class Looked(NamedTuple):
    """A text as it may leave, and what was found in it."""

    text: str
    copies: int
    personal: int


def guarded(client: Client, guard: Guard) -> Client:
    """Let a client's texts leave only without what may not; its reply counts what was found.

    The scalars `copied` and `personal` are places that were found, `withheld` texts that did not leave at all. What a
    silo's text is stands in its data as `texts`.
    """
    known: dict[str, set[int]] = {}

    def watched(request: Request, silo: Silo) -> tuple[Reply, Tensors]:
        reply, memory = client(request, silo)
        names = [name.removesuffix(".utf8") for name in reply.tensors if name.endswith(".utf8")]
        if not names:
            return reply, memory
        if silo.name not in known:
            known[silo.name] = sequences(silo.data.get("texts", ()), guard.n)
        public = sequences(sent(request.tensors), guard.n)
        tensors, counts = dict(reply.tensors), {"copied": 0, "personal": 0, "withheld": 0}
        for name in names:
            looks = [look(text, guard, known[silo.name], public) for text in texts_in(name, reply.tensors)]
            tensors |= as_tensors(name, [each.text for each in looks])
            counts["copied"] += sum(each.copies for each in looks)
            counts["personal"] += sum(each.personal for each in looks)
            counts["withheld"] += sum(not each.text and bool(each.copies or each.personal) for each in looks)
        told = {key: float(value) for key, value in counts.items()}
        return reply._replace(tensors=tensors, scalars={**reply.scalars, **told}), memory

    return watched


def look(text: str, guard: Guard, known: Set[int], public: Set[int] = frozenset()) -> Looked:
    """Return a text as it may leave."""
    text, personal = guard.hide(text) if guard.hide else (text, 0)
    text, copies = without_copies(text, guard.n, known, public)
    if guard.action == "block" and (personal or copies):
        text = ""
    return Looked(text, copies, personal)


def without_copies(text: str, n: int, known: Set[int], public: Set[int]) -> tuple[str, int]:
    """Return the text with a mark for words that are `n` in a row of what is known and not public, and how often.

    What is left is looked through again: words that have come together may be a copy too.
    """
    found = 0
    while n and (places := copied(text, n, known, public)):
        found += len(places)
        pieces, end = [], 0
        for start, stop in places:
            pieces += [text[end:start], MARK]
            end = stop
        text = "".join([*pieces, text[end:]])
    return text, found


def copied(text: str, n: int, known: Set[int], public: Set[int]) -> list[tuple[int, int]]:
    """Return where in a text words are copied; places that touch are one."""
    words = list(WORD.finditer(text))
    places: list[tuple[int, int]] = []
    for first, value in enumerate(runs([word.group() for word in words], n)):
        if value in known and value not in public:
            start, stop = words[first].start(), words[first + n - 1].end()
            if places and start <= places[-1][1]:
                places[-1] = (places[-1][0], stop)
            else:
                places.append((start, stop))
    return places


def sequences(texts: Iterable[str], n: int) -> set[int]:
    """Return all sequences of `n` words of the texts, as hashes: a chance match takes out a few words too many."""
    return {value for text in texts for value in runs(WORD.findall(text), n)} if n else set()


def runs(words: Sequence[str], n: int) -> Iterator[int]:
    """Yield the hash of every `n` words in a row."""
    folded = [word.casefold() for word in words]
    return (hash(tuple(folded[first : first + n])) for first in range(len(folded) - n + 1))


def sent(tensors: Tensors) -> Iterator[str]:
    """Yield the texts among a request's tensors."""
    for name in tensors:
        if name.endswith(".utf8"):
            try:
                yield from texts_in(name.removesuffix(".utf8"), tensors)
            except Refused as problem:
                raise FedllmError(f"The server's request cannot be read ({problem}); is its version ours?") from problem


def strings(row: Any) -> Iterator[str]:
    """Yield every text in a row, also inside lists and tables.

    >>> list(strings({"a": "b", "c": [{"d": "e"}, 1]}))
    ['b', 'e']
    """
    if isinstance(row, str):
        yield row
    elif isinstance(row, dict):
        for value in row.values():
            yield from strings(value)
    elif isinstance(row, (list, tuple)):
        for value in row:
            yield from strings(value)


def hider(kinds: Sequence[str] | None = None, score: float = 0.4) -> Hide | None:
    """Return what hides personal data; without `kinds` the usual ones, and None where presidio is not installed."""
    from importlib.util import find_spec

    from fedllm.silo.pii import USUAL, recognizer, scrubbed

    if kinds is None and find_spec("presidio_analyzer") is None:
        return None
    recognizers = [recognizer(kind, "valid") for kind in (USUAL if kinds is None else kinds)]
    if not recognizers:
        return None

    def hide(text: str) -> tuple[str, int]:
        found = list[str]()
        return scrubbed(text, recognizers, score, found.append), len(found)

    return hide
