"""What a silo tells under secure aggregation, whoever the server is: the claims of the threat model, each by a try."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from fedllm.core.errors import Refused
from fedllm.core.types import Reply
from fedllm.exchange.secure.graph import neighbours_of
from fedllm.exchange.secure.keys import agreed, commitment, derived, own_keys
from fedllm.exchange.secure.masks import Mask, masked
from fedllm.exchange.secure.messages import KEYS, PART, SHARES, SUM, TAIL, TRAIN, Directory, context_of, read_directory
from fedllm.exchange.secure.settings import Settings, circle
from fedllm.exchange.secure.shares import joined, split
from fedllm.exchange.secure.silo import round_of
from tests.secure_sums import LIKE, SECRET, Wire, names_of, silo_of, whole


def flags(*places, of=5):
    return torch.tensor([place in places for place in range(of)], dtype=torch.uint8)


@pytest.fixture
def over():
    """A wire over which one round has gone, and its requests by op and silo."""
    wire = Wire(Settings(drop_outs=1))
    assert wire.round(names_of(5)).of
    return wire, {(request.op, request.client): request for request, _ in wire.seen}


def again(wire, request, **tensors):
    """Ask a silo once more, with some of our tensors other than they were."""
    changed = {f"{PART}/{key}": value for key, value in tensors.items()}
    return wire.answer(request._replace(tensors={**request.tensors, **changed}))


def fresh(wire, request, **tensors):
    """Ask a silo that remembers nothing."""
    wire.memory[request.client] = {}
    return again(wire, request, **tensors)


@pytest.mark.parametrize("op", [KEYS, SHARES, SUM])
def test_the_same_request_gets_the_same_reply(over, op):
    wire, asked = over
    before = next(reply for request, reply in wire.seen if (request.op, request.client) == (op, "s01"))
    after = wire.answer(asked[op, "s01"])
    assert after.tensors.keys() == before.tensors.keys()
    assert all(torch.equal(after.tensors[name], before.tensors[name]) for name in before.tensors)


@pytest.mark.parametrize("op", [SHARES, TRAIN, SUM])
def test_a_phase_is_answered_once_a_round_and_never_for_a_round_before(over, op):
    wire, asked = over
    with pytest.raises(Refused, match="answered once"):
        again(wire, asked[op, "s01"], there=flags(0, 1, 2, 3), asked=torch.tensor(6))
    wire.round(names_of(5), 1)
    with pytest.raises(Refused, match="answered once"):
        wire.answer(asked[op, "s01"])


def test_the_same_masks_are_never_on_two_updates(over):
    wire, asked = over
    with pytest.raises(Refused, match="answered once"):
        wire.answer(asked[TRAIN, "s01"]._replace(tensors={**asked[TRAIN, "s01"].tensors, "a": torch.ones(5, 3)}))
    first = {name: reply for (request, reply) in wire.seen if request.op == TRAIN for name in [request.client]}
    wire.round(names_of(5), 1)
    second = {request.client: reply for request, reply in wire.seen if request.op == TRAIN}
    difference = second["s01"].tensors["a"] - first["s01"].tensors["a"]
    assert not torch.equal(difference, (whole("s01", 1)["a"] - whole("s01")["a"]).int())


OTHERS = torch.arange(320).add(torch.arange(320) // 32).to(torch.uint8).view(10, 32)
BAD = {
    "too few left": (TRAIN, {"there": flags(0, 1, 2)}, "3 of 5 silos are left"),
    "itself lost": (TRAIN, {"there": flags(0, 2, 3, 4)}, "said to be lost"),
    "too few in the sum": (SUM, {"kept": flags(1, 2, 3)}, "3 of 5 silos are left"),
    "itself not in the sum": (SUM, {"kept": flags(0, 2, 3, 4)}, "said to be lost"),
    "in the sum without keys": (SUM, {"there": flags(0, 1, 2, 3)}, "did not share out its keys"),
    "no flags": (SUM, {"kept": flags(0, 1, 2, 3, 4) * 2}, "are not 5 flags"),
    "other keys": (
        SHARES,
        {"keys": OTHERS},
        "this silo's are not",
    ),
    "more silos than asked": (SHARES, {"asked": torch.tensor(4)}, "how many silos were asked"),
    "many lost already": (SHARES, {"asked": torch.tensor(9)}, "4 are lost already"),
}


@pytest.mark.parametrize(("op", "tensors", "why"), BAD.values(), ids=BAD)
def test_a_silo_does_not_answer_a_server_that_asks_for_more_than_was_agreed(over, op, tensors, why):
    wire, asked = over
    with pytest.raises(Refused, match=why):
        fresh(wire, asked[op, "s01"], **tensors)


def test_a_key_on_a_bad_point_that_the_server_hands_on_is_refused(over):
    wire, asked = over
    keys = asked[SHARES, "s01"].tensors[f"{PART}/keys"].clone()
    keys[0] = 0
    with pytest.raises(Refused, match="bad point"):
        fresh(wire, asked[SHARES, "s01"], keys=keys)


def test_a_silo_tells_no_share_of_a_box_that_was_not_meant_so(over):
    wire, asked = over
    request = asked[SUM, "s01"]
    boxes = request.tensors[f"{PART}/boxes"]
    shares = fresh(wire, request, boxes=boxes[[1, 0, 2, 3, 4]]).tensors[f"{PART}/shares"]
    assert not shares[:2].any() and shares[2:].any(1).all()
    other = asked[SUM, "s02"].tensors[f"{PART}/boxes"]
    # Boxes for another silo, and of another set of silos, open here as little.
    assert not fresh(wire, request, boxes=other).tensors[f"{PART}/shares"].any()
    assert not fresh(wire, request, asked=torch.tensor(6)).tensors[f"{PART}/shares"].any()


def test_of_each_silo_one_kind_of_share_is_told(over):
    wire, asked = over
    shares = [
        fresh(wire, asked[SUM, "s01"], kept=flags(*kept)).tensors[f"{PART}/shares"]
        for kept in ([0, 1, 2, 3, 4], [0, 1, 2, 3])
    ]
    assert [torch.equal(one, other) for one, other in zip(*shares, strict=True)] == [True] * 4 + [False]


@pytest.mark.parametrize(("count", "colluding"), [(5, 0), (9, 2), (30, 3)])
def test_a_server_that_asks_each_half_for_another_kind_gets_too_few_of_one(count, colluding):
    now = circle(Settings(colluding=colluding, drop_outs=0), count, count)
    holders = now.neighbours + 1
    # Whoever colludes tells both kinds, everybody else one: even halved as well as can be one kind is missing.
    among = colluding if now.neighbours == count - 1 else 2 * now.threshold - 1 - holders
    best = max(min(told + among, holders - among - told + among) for told in range(holders - among + 1))
    assert best < now.threshold


def test_fewer_shares_than_the_threshold_tell_nothing():
    shares = split(b"k" * 32, 4, 7)
    with pytest.raises(Refused, match="3 shares came and 4 are needed"):
        joined(dict(enumerate(shares[:3])), 4, lambda secret: True)
    guesses = {joined({**dict(enumerate(shares[:3])), 6: bytes([n] * 32)}, 4, lambda secret: True) for n in range(16)}
    # Every secret fits three shares: each last share that is made up gives another one.
    assert len(guesses) == 16 and b"k" * 32 not in guesses


def test_what_a_silo_sends_hides_its_update_from_the_server_and_those_who_collude(over):
    wire, asked = over
    sent = next(reply for request, reply in wire.seen if (request.op, request.client) == (TRAIN, "s00"))
    about = round_of(asked[TRAIN, "s00"], silo_of("s00", {}), wire.settings, SECRET)
    numbers = np.concatenate([sent.tensors[name].numpy().ravel() for name in sorted(LIKE)]).view(np.uint32).copy()
    plain = np.concatenate([whole("s00")[name].numpy().ravel() for name in sorted(LIKE)]).astype(np.int32)
    # The server gets the own mask in the end, and three colluding silos tell all that they share with this one.
    masked(numbers, [Mask(derived(about.own_mask, about.context, "own"), False)])
    for other in (1, 2, 3):
        theirs = own_keys(SECRET, f"s{other:02}", other, 0)
        key = agreed(theirs.mask.private, about.keys.mask.public, about.context, "mask")
        masked(numbers, [Mask(key, False)])
    assert (np.abs(numbers.view(np.int32).astype(np.int64) - plain) > 2**20).mean() > 0.9
    last = own_keys(SECRET, "s04", 4, 0)
    masked(numbers, [Mask(agreed(last.mask.private, about.keys.mask.public, about.context, "mask"), False)])
    # With the last of the other silos in on it nothing is left to hide behind.
    assert np.array_equal(numbers.view(np.int32), plain)


def test_weight_loss_and_all_else_that_a_client_says_stay_at_the_silo(over):
    wire, _ = over
    for request, reply in wire.seen:
        assert reply.weight == 1.0 and not reply.scalars
        if request.op == TRAIN:
            assert reply.tensors.keys() == {*LIKE, TAIL}
            assert all(value.dtype == torch.int32 for value in reply.tensors.values())


def test_masked_numbers_look_alike_whatever_the_update_is():
    class Constant(Wire):
        def train(self, request, silo):
            return Reply(silo.name, request.round, {k: torch.zeros_like(v) for k, v in LIKE.items()}, 1.0), {}

    numbers = list[int]()
    for number in range(40):
        wire = Constant()
        wire.round(names_of(3), number)
        sent = [reply.tensors["a"].numpy().ravel() for request, reply in wire.seen if request.op == TRAIN]
        numbers += [int(each) & 0xF for values in sent for each in values]
        numbers += [int(each) >> 28 & 0xF for values in sent for each in values]
    counts = np.bincount(numbers, minlength=16)
    # Chi-square with 15 degrees of freedom: above 44.3 in one of ten thousand tries.
    assert ((counts - len(numbers) / 16) ** 2 / (len(numbers) / 16)).sum() < 44.3


def test_the_graph_is_drawn_by_the_keys_and_the_same_for_all(over):
    wire, asked = over
    request = asked[SHARES, "s01"]
    directory = read_directory(request.tensors, "s01", own_public("s01"))
    context = context_of(directory, 0, wire.settings)
    assert context != context_of(directory, 1, wire.settings)
    assert context != context_of(directory._replace(asked=6), 0, wire.settings)
    assert context != context_of(directory, 0, Settings(least=4))
    graph = neighbours_of(30, 8, context)
    assert all(len(set(each)) == 8 and own not in each for own, each in enumerate(graph))
    assert all(own in graph[other] for own, each in enumerate(graph) for other in each)
    assert graph != neighbours_of(30, 8, context[::-1])


def own_public(name):
    keys = own_keys(SECRET, name, int(name[1:]), 0)
    return keys.channel.public, keys.mask.public


def test_a_commitment_is_to_one_mask_in_one_round():
    assert commitment(b"a" * 32, b"x") == commitment(b"a" * 32, b"x")
    assert len({commitment(secret * 32, context) for secret in (b"a", b"b") for context in (b"x", b"y")}) == 4


def test_a_default_and_the_same_number_out_of_a_recipe_are_bound_to_alike():
    directory = Directory(["a"], [bytes(32)], [bytes(32)], 1)
    same = [context_of(directory, 0, Settings(largest_weight=weight)) for weight in (10_000, 10_000.0)]
    assert same[0] == same[1] != context_of(directory, 0, Settings(largest_weight=10_001))
