"""The vocabulary. Everything in fedllm is said in these words; read this file first.

A federated algorithm is three functions: `init`, `client` (runs where the data is) and
`server(state, exchange)` (runs where it is not). `exchange` sends requests and yields replies. It is
the only effect, and a runtime supplies it: one process, a batch of clients, or machines far apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from types import MappingProxyType
from typing import Any, NamedTuple, TypeAlias

import torch
from torch import Tensor, nn

Tensors: TypeAlias = Mapping[str, Tensor]
"""Weights, updates, optimiser state: flat name -> tensor."""

Scalars: TypeAlias = Mapping[str, float]
"""Numbers that travel beside the tensors."""

Report: TypeAlias = Mapping[str, float | str]
"""What a server tells of one round: `loss.<silo>`, `dropped.<silo>` (a reason), `clients`..."""

Dataset: TypeAlias = Mapping[str, Sequence[Any]]
"""A silo's examples by split: `train` and `test` (held out)."""

NOTHING: Mapping[str, Any] = MappingProxyType({})


class Aside(Mapping[str, Tensor]):
    """Tensors that lie outside of memory, such as in a file: each is read anew whenever it is asked for.

    `like` has their names, shapes and dtypes without the numbers. `read` raises `Refused` where what lies there cannot
    be read, or is not what it was. `cut` reads the values from one place of a flat tensor to another, if they can be
    read without the rest of it.
    """

    def __init__(
        self, like: Tensors, read: Callable[[str], Tensor], cut: Callable[[str, int, int], Tensor] | None = None
    ) -> None:
        self.like, self._read, self.cut = like, read, cut

    def __getitem__(self, name: str) -> Tensor:
        if name not in self.like:
            raise KeyError(name)
        return self._read(name)

    def __contains__(self, name: object) -> bool:
        return name in self.like

    def __iter__(self) -> Iterator[str]:
        return iter(self.like)

    def __len__(self) -> int:
        return len(self.like)


class Request(NamedTuple):
    """What a server asks of one client: do `op` with these tensors."""

    client: str
    round: int
    op: str
    tensors: Tensors
    scalars: Scalars = NOTHING
    then: Request | None = None
    """What the client will be asked after this, where that is known already: a runtime may let it begin at once."""


class Reply(NamedTuple):
    """What one client answers; `weight` says how much text stands behind it."""

    client: str
    round: int
    tensors: Tensors
    weight: float
    scalars: Scalars = NOTHING
    of: Sequence[str] = ()
    """The clients whose mean by weight this is, where only sums come through; no client can say this of its own."""
    lost: Mapping[str, str] = NOTHING
    """Beside such a mean: why other clients are not in it. With nobody in it there are no tensors."""


def ignore(tokens: int) -> None:
    """Take note of nothing."""


LATE = "it was late"
"""How the reason begins why a silo is not in a round that works but was not waited for; others are lost."""


class Silo(NamedTuple):
    """What one organisation holds. It never leaves the node.

    `model` has the trainable attached and may be shared by all the silos of a process: a client
    writes the request's tensors into it and promises nothing about what it leaves there.
    `memory` is what the node remembers from its last round. `tick` is told the tokens of every
    step; it may raise `Interrupted`.
    """

    name: str
    model: nn.Module
    data: Dataset
    memory: Tensors
    seed: int
    tick: Callable[[int], None] = ignore


class State(NamedTuple):
    """All that a server remembers between rounds: one safetensors file."""

    round: int
    params: Tensors
    optimiser: Tensors
    transforms: Tensors


Exchange: TypeAlias = Callable[[Sequence[Request]], Iterator[Reply]]
"""Replies come as they arrive, in any order; a client that fails sends none."""

Client: TypeAlias = Callable[[Request, Silo], tuple[Reply, Tensors]]
"""Pure: returns the reply and the node's new memory."""

Cohort: TypeAlias = Callable[[Sequence[tuple[Request, Silo]]], list[tuple[Reply, Tensors]]]
"""Many clients in one batch. Law: equals the clients one by one."""


class Work(NamedTuple):
    """What a client does in a round, one by one and, where it can, many at a time."""

    client: Client
    cohort: Cohort | None = None
    steps: Callable[[Dataset], int] = lambda data: 1
    """Steps that a client with this data takes in a round."""
    claim: Callable[[Facts], Facts] = lambda facts: facts
    """What is known of its update."""


class Facts(NamedTuple):
    """What is known of one silo's update, or of the aggregate, at one step of the round."""

    sees: str = "each"
    """Whether the server sees `each` silo's update, only their `sum`, sums of `groups`, or a `part` of each."""
    norm_bound: float | None = None
    """The largest L2 norm that the update can have, if there is one."""
    even: bool = False
    """Whether the aggregate is a plain mean in which every silo counts alike."""
    noise: float | None = None
    """Standard deviation of the noise over the norm bound, where noise was added."""


Claim: TypeAlias = Callable[[Facts], Facts]
"""From the facts before a step to the facts after it; raises `FedllmError` with the remedy if they do not fit."""


def unchanged(facts: Facts) -> Facts:
    """Claim nothing."""
    return facts


class Cut(NamedTuple):
    """What a transform's last word is told about the round it closes."""

    round: int
    clients: int
    weight: float


def as_it_is(mean: Tensors, state: Tensors, cut: Cut) -> tuple[Tensors, Tensors]:
    """Leave the aggregate alone."""
    return mean, state


class Transform(NamedTuple):
    """Something that happens to an update on its way: a client half, a server half, a last word.

    `encode(update, memory, seed)` returns what travels and the new memory. It also runs on meta
    tensors, which is how the plan knows the bytes. `decode(wire, like)` undoes it or raises
    `Refused`; `like` has the names, shapes and dtypes that must come back. `finish` sees only the
    aggregate. Law: `decode(encode(u))` keeps every name, shape and dtype; inputs are not mutated; what
    is remembered of a name stays until a round updates that name.
    """

    name: str
    encode: Callable[[Tensors, Tensors, int], tuple[Tensors, Tensors]]
    decode: Callable[[Tensors, Tensors], Tensors]
    finish: Callable[[Tensors, Tensors, Cut], tuple[Tensors, Tensors]] = as_it_is
    claim: Claim = unchanged
    decoded: Claim = unchanged
    """What the server knows after `decode`, whatever the silo sent."""
    finished: Claim = unchanged
    """What is known of the aggregate after `finish`."""
    always: bool = False
    """Whether `finish` has its word also in a round to which no silo added anything, on an aggregate of 0."""
    at: Callable[[int, Tensors], Transform] | None = None
    """Where a half depends on the round or on what it remembers: from those to the transform of this one round."""
    summable: bool = False
    """Whether `decode` of a mean of what travels is the mean of what `decode` makes of each."""
    apart: bool = False
    """Whether a tensor alone is encoded, decoded and finished as it is among others."""
    by_value: bool = False
    """Whether, of a tensor that travels under its name and in its shape, also a value alone is decoded so."""


def nothing_lost(number: int, client: str) -> str | None:
    """Let every reply through."""
    return None


class Middleware(NamedTuple):
    """Something around the exchange that needs messages of its own, and perhaps a half at the client.

    `lost(round, client)` says why it keeps a client's reply from the server in a round, if it does; pure. `ops` are
    those of its own messages, each done once a round. `cohort` is its client half where many clients are one batch.
    """

    name: str
    exchange: Callable[[Exchange], Exchange]
    client: Callable[[Client], Client] | None = None
    claim: Claim = unchanged
    lost: Callable[[int, str], str | None] = nothing_lost
    ops: Sequence[str] = ()
    cohort: Callable[[Cohort], Cohort] | None = None
    wire: Callable[[Tensors], Tensors] = dict
    """From what a client would send up to what it does send, in its largest message; runs on meta tensors."""


class Aggregator(NamedTuple):
    """A fold over updates: streams, takes any order, and holds the memory of one update or of a few small ones.

    `add(total, update, weight)` may reuse the memory of `total`, never that of `update`, which nobody changes later.
    Law: one tensor after the other comes to the same.
    """

    name: str
    zero: Callable[[Tensors], Any]
    add: Callable[[Any, Tensors, float], Any]
    done: Callable[[Any], Tensors]
    claim: Claim = unchanged
    again: Callable[[Any], Any] | None = None
    """From a total that is done with to one of nothing, for the same names and shapes, in the memory of it."""


class Probe(NamedTuple):
    """A fold that only looks: like an aggregator, but ends in numbers for the report."""

    name: str
    zero: Callable[[Tensors], Any]
    add: Callable[[Any, Tensors, float], Any]
    done: Callable[[Any], Scalars]
    claim: Claim = unchanged


class ServerOptimizer(NamedTuple):
    """Applies the aggregate as a pseudo-gradient (start - end): `step(params, mean, state)`.

    Law: one tensor after the other, or of float32 one part of a flat tensor after the other, each with its part of the
    state as `init` names it, comes to the same. What `init` makes of no tensor at all belongs to the step; the rest has
    the shape of its tensor.
    """

    name: str
    init: Callable[[Tensors], Tensors]
    step: Callable[[Tensors, Tensors, Tensors], tuple[Tensors, Tensors]]


Select: TypeAlias = Callable[[int], Sequence[str]]
"""From the round to the clients that take part in it; pure, so that a resumed run asks the same ones."""


def all_of_it(state: State, client: str) -> Tensors:
    """Send all parameters."""
    return state.params


class Share(NamedTuple):
    """What of the parameters travels: down to one client, and up from every client of a round.

    `up(round, params)` picks the same names every `period` rounds, in the order they have there, and raises
    `FedllmError` where a name would never have its turn. `work` is the client's half: it may keep weights of its own
    between rounds. `note(state, asked, answered)` is what the server remembers of its clients. `around` may have
    messages of its own before a round's, where what travels depends on what the silos say. Of a `partial` share a
    silo trains also what does not travel, and keeps it. `settled(round)` says whether what goes down in the round after
    this one is known as this one begins, so that a client that answers need not wait for the server in between.
    """

    name: str
    down: Callable[[State, str], Tensors] = all_of_it
    up: Callable[[int, Tensors], Tensors] = lambda number, params: params
    period: int = 1
    work: Callable[[Work], Work] = lambda work: work
    note: Callable[[State, Sequence[str], Set[str]], Tensors] = lambda state, asked, answered: {}
    packed: Callable[[Tensors], Tensors] = lambda params: params
    """How what comes back would be sent down to a client that follows the run; runs on meta tensors."""
    around: Callable[[Algorithm, Select], Algorithm] = lambda algorithm, select: algorithm
    partial: bool = False
    settled: Callable[[int], bool] = lambda number: False


class Step(NamedTuple):
    """One step of the round as the plan shows it."""

    where: str
    """`server`, `silo` or `wire`."""
    name: str
    claim: Claim = unchanged


class Algorithm(NamedTuple):
    """A federated algorithm: three functions and, where it can, its clients as one batch.

    `server` may use up the state that it is given, tensor by tensor: only the one that it returns is gone on with.
    """

    init: Callable[[Tensors], State]
    client: Client
    server: Callable[[State, Exchange], tuple[State, Report]]
    cohort: Cohort | None = None
    steps: Sequence[Step] = ()
    wire: Callable[[Tensors], Tensors] = dict
    """What one client sends up in a round for such parameters, at most; runs on meta tensors."""
    down: Callable[[Tensors], Tensors] = dict
    """What one client that follows the run is sent in a round, at most; runs on meta tensors."""
    ops: Sequence[str] = ("train",)
    """What its client can be asked to do."""
    ahead: bool = False
    """Whether a round says what the next will ask, which far clients begin while their reply is under way."""


def on_meta(tensors: Tensors) -> dict[str, Tensor]:
    """Return the same names, shapes and dtypes without the numbers."""
    return {name: torch.empty_like(value, device="meta") for name, value in tensors.items()}
