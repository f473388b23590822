"""What a round asks of its clients, and what the next round will ask of them, where that is known already."""

from __future__ import annotations

from collections.abc import Collection, Sequence

from fedllm.core.tensors import under
from fedllm.core.types import Request, Share, State, Tensors


def asking(share: Share, state: State, names: Sequence[str], following: Collection[str] = ()) -> list[Request]:
    """Return this round's requests; those to clients that the next round follows with say what it will ask them."""
    same = dict[tuple[tuple[str, int], ...], Tensors]()

    def request(name: str, state: State) -> Request:
        down = share.down(state, name)
        # One mapping for all that are sent the same: a runtime packs each mapping once.
        down = same.setdefault(tuple((key, id(value)) for key, value in down.items()), down)
        return Request(name, state.round, "train", down)

    then = {name: request(name, answered(share, state, name)) for name in names if name in following}
    return [request(name, state)._replace(then=then.get(name)) for name in names]


def answered(share: Share, state: State, name: str) -> State:
    """Return the state of the next round as far as a client that answers in this one can see it."""
    memory = {key: value for key, value in state.transforms.items() if not key.startswith("share/")}
    noted = under("share", share.note(state, [name], {name}))
    return state._replace(round=state.round + 1, transforms={**memory, **noted})
