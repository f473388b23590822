"""Replies that lie in files are summed and applied tensor by tensor: to the bit what comes of those in memory."""

from __future__ import annotations

import itertools
import os
import tempfile
import weakref
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core import aggregate, by_tensor
from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.optimisers import fedadagrad, fedadam, fedavg, fedavgm, fedyogi, nesterov
from fedllm.core.round import averaging, wire_stages
from fedllm.core.types import Aside, Probe, Reply, Work, on_meta
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.dct import dct
from fedllm.exchange.fragments import fragments
from fedllm.exchange.quantise import quantise
from fedllm.exchange.top_k import top_k
from fedllm.runtime.spool import load_message, open_message, save_message
from fedllm.runtime.wire import reply_head, reply_of
from tests.unit.test_round import same, scripted

NAMES = ["a", "b", "c"]
TRANSFORMS = [[], [cast()], [quantise(4), cast()], [top_k(0.3)], [dct(keep=3, chunk=4, sign=True)], [clip(0.5), cast()]]
OPTIMISERS = [fedavg(), fedavgm(), nesterov(0.7, 0.9), fedadam(), fedadagrad(), fedyogi()]
SHAPES = st.lists(st.lists(st.integers(1, 9), max_size=3).map(tuple), min_size=1, max_size=4)
DTYPES = st.lists(st.sampled_from([torch.float32, torch.float32, torch.bfloat16]), min_size=4, max_size=4)


def tensors(shapes, dtypes, seed):
    draw = torch.Generator().manual_seed(seed)
    kinds = zip(shapes, dtypes, strict=False)
    return {f"layers.{n}.x": torch.randn(shape, generator=draw).to(dtype) for n, (shape, dtype) in enumerate(kinds)}


def algorithm_of(transforms=(), optimiser=None, **parts):
    work = Work(lambda request, silo: (Reply("", 0, {}, 1.0), {}))
    defaults = {"select": lambda number: NAMES, "aggregate": mean(), "transforms": transforms, "optimiser": optimiser}
    return averaging(work=work, **defaults | parts)


def sent(update, transforms):
    for place, transform in enumerate(transforms):
        update, _ = transform.encode(update, {}, place)
    return update


def on_disk(folder, replies):
    """Write replies to files as `remote` does with those of large models: open, and without a name."""
    for place, reply in enumerate(replies):
        path = Path(folder) / f"{place}"
        save_message(path, reply.tensors, reply_head(reply))
        opened = reply_of(*open_message(path))
        path.unlink()
        yield opened
        del opened


def copied(state):
    return state._replace(params=dict(state.params), optimiser=dict(state.optimiser))


@settings(deadline=None, max_examples=20)
@given(
    SHAPES,
    DTYPES,
    st.sampled_from(TRANSFORMS),
    st.sampled_from(OPTIMISERS),
    st.lists(st.sampled_from([1.0, 7.0, 12_345.0, 1e6]), min_size=3, max_size=3),
    st.sets(st.sampled_from(NAMES), max_size=2),
    st.permutations(range(3)),
    st.sampled_from([3, 16, by_tensor.PART]),
)
def test_it_is_to_the_bit_what_a_fold_of_replies_in_memory_gives(
    shapes, dtypes, transforms, optimiser, weights, dropped, order, part
):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(by_tensor, "PART", part)
        to_the_bit(shapes, dtypes, transforms, optimiser, weights, dropped, order)


def to_the_bit(shapes, dtypes, transforms, optimiser, weights, dropped, order):
    algorithm = algorithm_of(transforms, optimiser)
    states = [algorithm.init(tensors(shapes, dtypes, 0)) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(2):
            replies = [
                Reply(name, number, sent(tensors(shapes, dtypes, 10 * number + place + 1), transforms), weight)
                for place, (name, weight) in enumerate(zip(NAMES, weights, strict=True))
            ]
            for place, reply in enumerate(replies):
                if reply.client in dropped:
                    first = next(iter(reply.tensors))
                    replies[place] = reply._replace(tensors={**reply.tensors, first: torch.zeros(11)})
            shuffled = on_disk(folder, [replies[place] for place in order])
            (states[0], told), (states[1], heard) = (
                algorithm.server(states[0], scripted(replies)),
                algorithm.server(states[1], scripted(shuffled)),
            )
            assert told == heard and told["clients"] == 3 - len(dropped)
            assert same(*states)


def test_a_fragment_alone_is_changed():
    algorithm = algorithm_of(optimiser=nesterov(0.7, 0.9), share=fragments(2))
    start = tensors([(3,)] * 4, [torch.float32] * 4, 0)
    states = [algorithm.init(start) for _ in range(2)]
    with tempfile.TemporaryDirectory() as folder:
        for number in range(3):
            own = {name: value for name, value in tensors([(3,)] * 4, [torch.float32] * 4, number + 1).items()}
            part = {name: value for name, value in own.items() if int(name.split(".")[1]) % 2 == number % 2}
            replies = [Reply(name, number, part, 1.0) for name in NAMES]
            states[0], _ = algorithm.server(states[0], scripted(replies))
            states[1], _ = algorithm.server(states[1], scripted(on_disk(folder, replies)))
            assert same(*states)


def test_replies_in_files_and_in_memory_may_come_together(tmp_path):
    algorithm, start = algorithm_of(), tensors([(2, 3), (5,)], [torch.float32] * 2, 0)
    replies = [Reply(name, 0, tensors([(2, 3), (5,)], [torch.float32] * 2, n), 1.0) for n, name in enumerate(NAMES, 1)]
    expected, _ = algorithm.server(algorithm.init(start), scripted(replies))
    for mixed in itertools.permutations([replies[0], *on_disk(tmp_path, replies[1:])]):
        assert same(algorithm.server(algorithm.init(start), scripted(mixed))[0], expected)


def test_probes_see_each_update(tmp_path):
    def add(seen, update, weight):
        return [*seen, sum(value.sum().item() for value in update.values())]

    probe = Probe("sums", lambda like: [], add, lambda seen: {f"sum_{place}": each for place, each in enumerate(seen)})
    replies = [Reply(name, 0, {"x": torch.ones(n), "y": torch.ones(2)}, 1.0) for n, name in [(3, "a"), (3, "b")]]
    algorithm = algorithm_of(probes=[probe])
    state = algorithm.init({"x": torch.zeros(3), "y": torch.zeros(2)})
    _, report = algorithm.server(state, scripted(on_disk(tmp_path, replies)))
    assert report["sum_0"] == report["sum_1"] == 5.0


SHAPE = {"x": torch.zeros(1000), "y": torch.zeros(4)}


def three(number=0):
    return [Reply(name, number, {key: torch.full_like(v, n) for key, v in SHAPE.items()}, 1.0) for n, name in
            enumerate(NAMES, 1)]  # fmt: skip


def scribbled(path, place, data):
    with path.open("r+b") as file:
        file.seek(place)
        file.write(data)
    os.utime(path, ns=(1, 1))


BAD = {
    "truncated": lambda path: os.truncate(path, path.stat().st_size - 3),
    "emptied": lambda path: os.truncate(path, 0),
    "changed": lambda path: scribbled(path, path.stat().st_size - 4, b"\0\0\0\1"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_file_that_is_changed_after_it_was_looked_at_ends_the_round_and_is_named(tmp_path, what):
    def exchange(requests):
        for reply in three():
            save_message(tmp_path / reply.client, reply.tensors, reply_head(reply))
            yield reply_of(*open_message(tmp_path / reply.client))
        BAD[what](tmp_path / "c")

    algorithm = algorithm_of()
    with pytest.raises(FedllmError, match=r"Round 1 .* reply of 'c' .*its file was changed after it came.*resume"):
        algorithm.server(algorithm.init(SHAPE), exchange)


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"x": torch.full((1000,), float("nan")), "y": torch.ones(4)}, "'x' is not finite"),
        ({"x": torch.ones(1000), "y": torch.tensor([1.0, 2.0, 3.0, float("inf")])}, "'y' is not finite"),
        ({"x": torch.ones(1000)}, "wrong names"),
        ({"x": torch.ones(1000), "y": torch.ones(4), "z": torch.ones(1)}, "wrong names"),
        ({"x": torch.ones(100, 10), "y": torch.ones(4)}, "'x' has shape (100, 10)"),
        ({"x": torch.ones(1000).double(), "y": torch.ones(4)}, "'x' has dtype torch.float64"),
    ],
    ids=lambda each: each if isinstance(each, str) else "",
)
def test_a_file_that_cannot_be_used_is_left_out_when_it_comes(tmp_path, lie, reason):
    algorithm = algorithm_of()
    wanted, _ = algorithm.server(algorithm.init(SHAPE), scripted(three()[1:]))
    bad = [three()[0]._replace(tensors=lie), *three()[1:]]
    after, report = algorithm.server(algorithm.init(SHAPE), scripted(on_disk(tmp_path, bad)))
    assert same(after, wanted) and reason in report["dropped.a"] and report["clients"] == 2


def test_no_tensor_of_a_wrong_shape_is_read():
    def read(name):
        raise AssertionError("it was read")

    lying = Aside(on_meta({"x": torch.zeros(2000), "y": torch.zeros(4)}), read)
    algorithm = algorithm_of()
    _, report = algorithm.server(algorithm.init(SHAPE), scripted([three()[0]._replace(tensors=lying), *three()[1:]]))
    assert "has shape (2000,)" in report["dropped.a"]


def failing(tensors, after):
    """Tensors of which one cannot be read any more after so many readings."""
    left = itertools.count(after, -1)

    def read(name):
        if next(left) <= 0:
            raise Refused("the disk is gone")
        return tensors[name].clone()

    return Aside(on_meta(tensors), read)


def test_a_file_that_fails_while_it_is_added_up_ends_the_round_and_says_whose():
    algorithm = algorithm_of()
    # Looked at when it comes, both tensors; then summed.
    bad = three()[0]._replace(tensors=failing(three()[0].tensors, 3))
    with pytest.raises(FedllmError, match=r"Round 1 .* reply of 'a' .*the disk is gone.*resume"):
        algorithm.server(algorithm.init(SHAPE), scripted([bad]))


def test_each_tensor_is_let_go_before_the_next(monkeypatch):
    """At no time does the server hold two tensors of updates, or an old parameter beside all the new ones."""
    monkeypatch.setattr(aggregate, "HELD", 0)
    like = {f"layer.{n}": torch.zeros(100) for n in range(6)}
    algorithm = algorithm_of(optimiser=nesterov(0.7, 0.9))
    alive, most = weakref.WeakSet(), []

    def watched(update):
        def read(name):
            value = update[name].clone()
            most.append(len(alive))
            alive.add(value)
            return value

        return Aside(on_meta(update), read)

    state = algorithm.init({name: value.clone() for name, value in like.items()})
    old = weakref.WeakSet(state.params.values())
    replies = [Reply(name, 0, watched({key: torch.ones(100) for key in like}), 1.0) for name in NAMES]
    after, _ = algorithm.server(state, scripted(replies))
    assert max(most) <= 1 and len(most) == 2 * 3 * len(like)
    # The caller still has the state that it gave: it is used up.
    assert len(old) == 0 and state.params is after.params


def test_a_sum_needs_the_memory_of_a_part_of_a_tensor(monkeypatch):
    """Whatever the tensor's size: nothing is read whole, and a sum is begun no more than once for parts of one size."""
    monkeypatch.setattr(by_tensor, "PART", 4)
    rule, begun, read = mean(), [], []
    like = {"x": torch.zeros(5, 4), "y": torch.zeros(6)}

    def zero(kind):
        begun.append([value.numel() for value in kind.values()])
        return rule.zero(kind)

    def cut(name, start, stop):
        read.append(stop - start)
        return torch.arange(start, stop).float()

    def whole(name):
        raise AssertionError("it was read whole")

    algorithm = algorithm_of(aggregate=rule._replace(zero=zero), transforms=[cast()])
    short = {name: value.bfloat16() for name, value in like.items()}
    lying = Aside(on_meta(short), whole, lambda *where: cut(*where).bfloat16())
    after, _ = algorithm.server(algorithm.init(like), scripted([three()[0]._replace(tensors=lying)]))
    assert begun == [[4], [2]] and max(read) == 4
    assert {name: (-value).flatten().tolist() for name, value in after.params.items()} == {
        "x": list(range(20)),
        "y": list(range(6)),
    }


def test_values_whose_norm_is_too_large_are_refused_in_parts_as_in_whole(monkeypatch):
    monkeypatch.setattr(by_tensor, "PART", 4)
    values = {"x": torch.full((64,), 5e18)}
    lying = Aside(on_meta(values), values.__getitem__, lambda name, *where: values[name][slice(*where)])
    algorithm = algorithm_of()
    start = algorithm.init({"x": torch.zeros(64)})
    for tensors in (values, lying):
        replies = [Reply("a", 0, tensors, 1.0), Reply("b", 0, {"x": torch.ones(64)}, 1.0)]
        _, report = algorithm.server(copied(start), scripted(replies))
        assert "too large to add up" in report["dropped.a"]


def test_a_files_name_may_go_and_the_file_is_closed_with_its_tensors(tmp_path):
    path = save_message(tmp_path / "m", {"x": torch.arange(3.0)}, {"client": "a"}).path
    held, head = open_message(path)
    path.unlink()
    assert held["x"].tolist() == [0, 1, 2] and head == {"client": "a"} and list(tmp_path.iterdir()) == []
    assert "x" in held and "y" not in held and held.get("y") is None and len(held) == 1
    number = os.open(tmp_path, os.O_RDONLY)
    os.close(number)
    del held
    # The lowest number that is free is given: it was the file's.
    lower = os.open(tmp_path, os.O_RDONLY)
    os.close(lower)
    assert lower < number


def test_what_lies_in_a_file_is_what_is_loaded_from_it(tmp_path):
    own = {"b": torch.tensor([True, False]), "a": torch.randn(2, 3).to(torch.bfloat16), "empty": torch.zeros(0, 4)}
    path = save_message(tmp_path / "m", own, {}).path
    loaded, held = load_message(path)[0], open_message(path)[0]
    assert list(loaded) == list(held) == list(own)
    for name in reversed(own):
        assert torch.equal(held[name], loaded[name]) and held[name].dtype == held.like[name].dtype == own[name].dtype
        assert held.like[name].shape == own[name].shape


@pytest.mark.parametrize("transforms", [each for each in TRANSFORMS if all(one.apart for one in each)], ids=str)
def test_what_travels_of_a_tensor_is_the_same_alone_and_among_others(transforms):
    like = on_meta(tensors([(4, 5), (), (7,)], [torch.float32, torch.bfloat16, torch.float32], 0))
    whole = wire_stages(transforms, like)[-1]
    each = [wire_stages(transforms, {name: value})[-1] for name, value in like.items()]
    assert {name: value.shape for name, value in whole.items()} == {
        name: value.shape for one in each for name, value in one.items()
    }
