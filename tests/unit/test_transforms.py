"""What happens to an update on its way, with numbers worked out by hand."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.round import averaging
from fedllm.core.tensors import norm
from fedllm.core.types import Facts, Reply, Request, Silo, Work
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.top_k import top_k
from tests.messages import pack_reply, unpack_reply


def test_clip_scales_a_norm_of_five_down_to_one():
    # The norm is over all tensors together: sqrt(3^2 + 4^2) = 5.
    update = {"x": torch.tensor([3.0]), "y": torch.tensor([[0.0, 4.0]])}
    wire, memory = clip(1.0).encode(update, {}, 0)
    assert wire["x"].tolist() == pytest.approx([0.6]) and wire["y"].tolist()[0] == pytest.approx([0.0, 0.8])
    assert memory == {}


def test_clip_leaves_a_small_update_and_nothing_at_all_as_they_are():
    for values in ([0.3, 0.4], [0.0, 0.0]):
        update = {"x": torch.tensor(values)}
        assert torch.equal(clip(1.0).encode(update, {}, 0)[0]["x"], update["x"])


def test_the_server_clips_what_a_lying_client_did_not():
    algorithm = averaging(
        work=Work(lambda request, silo: None), select=lambda n: ["liar"], aggregate=mean(), transforms=[clip(1.0)]
    )
    params = {"x": torch.tensor([0.0, 0.0])}
    lie = Reply("liar", 0, {"x": torch.tensor([300.0, -400.0])}, 1.0)
    after, _ = algorithm.server(algorithm.init(params), lambda requests: iter([lie]))
    assert after.params["x"].tolist() == pytest.approx([-0.6, 0.8])
    assert float(norm(after.params)) <= 1.0 + 1e-6


def test_clip_says_what_bound_it_gives():
    assert clip(2.0).claim(Facts()).norm_bound == 2.0
    assert clip(2.0).claim(Facts(norm_bound=1.0)).norm_bound == 1.0
    assert clip(2.0).claim(Facts(norm_bound=3.0)).norm_bound == 2.0


@pytest.mark.parametrize("bound", [0.0, -1.0])
def test_clip_refuses_a_bound_that_is_not_above_zero(bound):
    with pytest.raises(FedllmError, match="max_norm is"):
        clip(bound)


def test_cast_rounds_to_bfloat16_and_stays_so_on_the_wire():
    # bfloat16 has 8 significant bits: 1 + 2^-8 is half way and goes to the even 1; 1 + 3 * 2^-8 to 1 + 2^-6.
    update = {"x": torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-7])}
    wire, _ = cast().encode(update, {}, 0)
    assert wire["x"].dtype == torch.bfloat16
    arrived = unpack_reply(pack_reply(Reply("a", 0, wire, 1.0))).tensors
    assert arrived["x"].dtype == torch.bfloat16
    back = cast().decode(arrived, update)["x"]
    assert back.dtype == torch.float32 and back.tolist() == [1.0, 1 + 2**-6, 1 + 2**-7]


def test_cast_leaves_whole_numbers_alone():
    update = {"n": torch.tensor([2**30 + 1])}
    wire, _ = cast("float16").encode(update, {}, 0)
    assert wire["n"] is update["n"]


def test_top_k_with_error_feedback_by_hand():
    transform = top_k(0.5)
    like = {"x": torch.zeros(4)}
    # Of 5, -1, 2, -7 the half that is largest is 5 and -7; -1 and 2 are kept for later.
    wire, memory = transform.encode({"x": torch.tensor([5.0, -1.0, 2.0, -7.0])}, {}, 0)
    assert wire["x:values"].tolist() == [5.0, -7.0] and wire["x:positions"].tolist() == [0, 3]
    assert wire["x:positions"].dtype == torch.int32
    assert memory["x"].tolist() == [0.0, -1.0, 2.0, 0.0]
    assert transform.decode(wire, like)["x"].tolist() == [5.0, 0.0, 0.0, -7.0]
    # Then 1, -3, 1, 1 on top of what was kept is 1, -4, 3, 1: now the two of before are sent.
    wire, memory = transform.encode({"x": torch.tensor([1.0, -3.0, 1.0, 1.0])}, memory, 0)
    assert transform.decode(wire, like)["x"].tolist() == [0.0, -4.0, 3.0, 0.0]
    assert memory["x"].tolist() == [1.0, 0.0, 0.0, 1.0]


def test_top_k_without_error_feedback_forgets_the_rest():
    wire, memory = top_k(0.25, error_feedback=False).encode({"x": torch.tensor([[1.0, -9.0], [3.0, 4.0]])}, {}, 0)
    assert memory == {}
    assert top_k(0.25).decode(wire, {"x": torch.zeros(2, 2)})["x"].tolist() == [[0.0, -9.0], [0.0, 0.0]]


def test_top_k_sends_at_least_one_value_of_every_tensor():
    wire, _ = top_k(0.01).encode({"x": torch.tensor([1.0, 2.0]), "y": torch.tensor(3.0)}, {}, 0)
    assert wire["x:values"].tolist() == [2.0] and wire["y:values"].tolist() == [3.0]


@pytest.mark.parametrize("fraction", [0.0, -0.5, 1.5])
def test_top_k_refuses_a_fraction_that_is_none(fraction):
    with pytest.raises(FedllmError, match="fraction is"):
        top_k(fraction)


@pytest.mark.parametrize(
    ("positions", "reason"),
    [
        (torch.tensor([-1, 2], dtype=torch.int32), "outside of its 4 values"),
        (torch.tensor([0, 4], dtype=torch.int32), "outside of its 4 values"),
        (torch.tensor([0, 2**31 - 1], dtype=torch.int32), "outside of its 4 values"),
        (torch.tensor([2, 2], dtype=torch.int32), "do not rise"),
        (torch.tensor([3, 0], dtype=torch.int32), "do not rise"),
        (torch.tensor([0.0, 2.0]), "dtype"),
        (torch.tensor([0, 2]), "dtype"),
        (torch.tensor([0, 1, 2], dtype=torch.int32), "shape"),
    ],
    ids=lambda value: str(value.tolist()) if isinstance(value, torch.Tensor) else value,
)
def test_positions_that_a_hostile_client_sends_are_refused(positions, reason):
    transform = top_k(0.5)
    algorithm = averaging(
        work=Work(lambda request, silo: None),
        select=lambda n: ["good", "bad"],
        aggregate=mean(),
        transforms=[transform],
    )
    params = {"x": torch.zeros(4)}
    good, _ = transform.encode({"x": torch.tensor([1.0, 2.0, 3.0, 4.0])}, {}, 0)
    bad = {"x:values": torch.tensor([9.0, 9.0]), "x:positions": positions}
    answers = [Reply("bad", 0, bad, 1.0), Reply("good", 0, good, 1.0)]
    after, report = algorithm.server(algorithm.init(params), lambda requests: iter(answers))
    assert reason in report["dropped.bad"]
    assert after.params["x"].tolist() == [0.0, 0.0, -3.0, -4.0]


def test_positions_outside_are_refused_by_the_transform_itself():
    wire = {"x:values": torch.tensor([1.0]), "x:positions": torch.tensor([7], dtype=torch.int32)}
    with pytest.raises(Refused, match="'x' has a position outside of its 4 values"):
        top_k(0.25).decode(wire, {"x": torch.zeros(4)})


def test_clip_then_top_k_then_cast_stay_within_the_bound():
    parts = [clip(1.0), top_k(0.5), cast()]
    draw = torch.Generator().manual_seed(0)

    def client(request, silo):
        return Reply(request.client, request.round, {"x": torch.randn(64, generator=draw)}, 1.0), {}

    algorithm = averaging(work=Work(client), select=lambda n: ["a"], aggregate=mean(), transforms=parts)
    state, memory = algorithm.init({"x": torch.zeros(64)}), {}
    for _ in range(5):
        before = state.params["x"]

        def exchange(requests: list[Request]):
            nonlocal memory
            reply, memory = algorithm.client(requests[0], Silo("a", None, {}, memory, 0))
            assert {name: value.dtype for name, value in reply.tensors.items()} == {
                "x:values": torch.bfloat16,
                "x:positions": torch.int32,
            }
            yield reply

        state, _ = algorithm.server(state, exchange)
        moved = before - state.params["x"]
        assert 0 < float(moved.norm()) <= 1.0 + 1e-6 and int((moved != 0).sum()) <= 32
