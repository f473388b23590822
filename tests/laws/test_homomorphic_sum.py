"""Homomorphic sums: what silos open is the plain mean within the grid, of just the silos named, or it is not told."""

from __future__ import annotations

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.round import averaging
from fedllm.core.types import Facts, Reply, Request, Work
from fedllm.exchange.clip import clip
from fedllm.exchange.homomorphic.ckks import MODULUS
from fedllm.exchange.homomorphic.messages import CIPHER, OPEN, OPENED, PART, TRAIN
from fedllm.exchange.homomorphic.middleware import MOST_BYTES, homomorphic_sum
from fedllm.exchange.homomorphic.settings import Settings
from fedllm.exchange.secure.fixed_point import grid
from fedllm.runtime.local import local
from tests.homomorphic_sums import KEY, LIKE, SECRET, USUAL, Wire, names_of, plain_mean, silo_of

pytest.importorskip("tenseal", reason="homomorphic sums need tenseal: pip install 'fedllm[homomorphic]'")


def bound_of(settings, asked, weight, members):
    """How far the mean may be from the plain one: each value is rounded by less than a step, and float32 holds it."""
    step = grid(settings.bits, 1.0, asked).step
    return len(members) * step * settings.largest_weight / sum(weight(name) for name in members) + 1e-7


def near(reply, members, weight, settings, asked, number=0):
    assert list(reply.of) == sorted(members)
    assert reply.weight == sum(weight(name) for name in members)
    expected, bound = plain_mean(members, number, weight), bound_of(settings, asked, weight, members)
    return all(float((reply.tensors[name] - value).abs().max()) <= bound for name, value in expected.items())


@settings(max_examples=12, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 50), st.booleans()), min_size=3, max_size=9),
    st.sampled_from([["*"], ["a"], ["b"]]),
    st.sampled_from([16, 32]),
)
def test_the_opened_sum_is_the_plain_weighted_mean_of_those_that_came(silos, tensors, bits):
    names = names_of(len(silos))
    weights = {name: float(weight) for name, (weight, _) in zip(names, silos, strict=True)}
    there = [name for name, (_, comes) in zip(names, silos, strict=True) if comes]

    def fault(op, replies):
        return [reply for reply in replies if reply.client in there]

    chosen = Settings(tensors=tensors, bits=bits, largest_weight=50)
    reply = Wire(chosen, weights.__getitem__, fault=fault).round(names)
    if len(there) < 3:
        assert not reply.of and not reply.tensors and set(reply.lost) == set(names)
    else:
        assert near(reply, there, weights.__getitem__, chosen, len(names))
        assert set(reply.lost) == set(names) - set(there)


@pytest.mark.parametrize("bits", [16, 32])
def test_sizes_around_a_full_ciphertext_come_through(bits):
    for size in (1, 2041, 2042, 2043, 4084, 4085):
        like = {"x": torch.zeros(size)}
        value = torch.linspace(-1, 1, size)
        layer = homomorphic_sum(Settings(bits=bits), KEY, SECRET, 1.0, lambda number, like=like: like, weighted=False)
        client = layer.client(lambda request, silo, value=value: (Reply(silo.name, 0, {"x": value}, 1.0), {}))
        exchange = local(client, silo_of, {})
        (reply,) = layer.exchange(exchange)([Request(name, 0, TRAIN, {}) for name in names_of(3)])
        assert float((reply.tensors["x"] - value).abs().max()) <= grid(bits, 1.0, 3).step + 1e-7


def test_only_what_is_encrypted_is_hidden_and_no_weight_is_told():
    wire = Wire(Settings(tensors=["b"], largest_weight=50), weight=lambda name: 7.0)
    wire.round(names_of(3))
    trained = [reply for request, reply in wire.seen if request.op == TRAIN]
    assert all(set(reply.tensors) == {"a", CIPHER} and reply.weight == 1.0 and not reply.scalars for reply in trained)
    # The same numbers again are other ciphertexts, which look like chance.
    other = Wire(Settings(tensors=["b"], largest_weight=50), weight=lambda name: 7.0)
    other.round(names_of(3))
    again = [reply for request, reply in other.seen if request.op == TRAIN]
    one, two = (each[0].tensors[CIPHER] for each in (trained, again))
    assert torch.equal(trained[0].tensors["a"], again[0].tensors["a"]) and not torch.equal(one, two)
    assert abs(float(one.double().mean()) / 2**59 - 1) < 0.05


def test_what_is_opened_has_none_of_the_ciphertexts_noise_left():
    """Who sees that noise can reckon the key (Li and Micciancio 2021): two openings of equal sums are the same bits."""
    opened = []
    for _ in range(2):
        wire = Wire()
        wire.round(names_of(4))
        opened += [reply.tensors[OPENED] for request, reply in wire.seen if request.op == OPEN]
    assert len(opened) == 4 and all(torch.equal(opened[0], other) for other in opened)


def mangled(value, chance):
    spoilt = value.clone()
    flat = spoilt.view(-1)
    flat[chance.randrange(flat.numel())] += chance.choice([1, 2, 1 << 20])
    longer = torch.full_like(value, torch.iinfo(value.dtype).max)
    return chance.choice([spoilt, value[:0], value.float(), longer, -value - 1, torch.zeros(0, dtype=torch.uint8)])


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_messages_of_one_silo_that_are_mangled_never_make_a_wrong_sum(seed):
    chance, names = random.Random(seed), names_of(5)
    op, victim = chance.choice([TRAIN, OPEN]), chance.choice(names[:2])

    def fault(now, replies):
        return [
            reply._replace(tensors={key: mangled(value, chance) for key, value in reply.tensors.items()})
            if now == op and reply.client == victim
            else reply
            for reply in replies
        ]

    reply = Wire(fault=fault).round(names)
    if reply.of:
        assert near(reply, reply.of, lambda name: 1.0, USUAL, 5)
    else:
        why = reply.lost[next(name for name in names if name != victim)]
        assert "no sum: " in why and (
            "tags" in why or "whole numbers" in why or "different numbers" in why or "is not of" in why
        )


ODD = {
    "beyond the modulus": (lambda cipher: torch.full_like(cipher, MODULUS), "outside the modulus"),
    "below zero": (lambda cipher: -cipher - 1, "outside the modulus"),
    "one row too many": (lambda cipher: torch.cat([cipher, cipher]), "have the shape"),
    "other numbers": (lambda cipher: cipher.double(), "no ciphertexts"),
    "bytes": (lambda cipher: cipher.view(torch.uint8), "no ciphertexts"),
}


@pytest.mark.parametrize(("change", "said"), ODD.values(), ids=ODD)
def test_what_is_no_ciphertext_puts_out_its_silo_by_a_reason(change, said):
    names = names_of(4)

    def fault(op, replies):
        if op != TRAIN:
            return replies
        return [replies[0]._replace(tensors={CIPHER: change(replies[0].tensors[CIPHER])}), *replies[1:]]

    reply = Wire(fault=fault).round(names)
    assert near(reply, names[1:], lambda name: 1.0, USUAL, 4) and said in reply.lost["s00"]


def test_a_value_in_clear_that_is_beyond_the_largest_puts_out_its_silo():
    chosen, names = Settings(tensors=["b"], largest_weight=50), names_of(4)

    def fault(op, replies):
        if op != TRAIN:
            return replies
        large = torch.full_like(replies[0].tensors["a"], 2**31 - 1)
        return [replies[0]._replace(tensors={**replies[0].tensors, "a": large}), *replies[1:]]

    reply = Wire(chosen, fault=fault).round(names)
    assert near(reply, names[1:], lambda name: 1.0, chosen, 4) and "beyond the largest" in reply.lost["s00"]


def test_a_reply_of_another_round_put_in_this_ones_place_is_found_out():
    names, before = names_of(3), {}

    def fault(op, replies):
        if op == TRAIN and before:
            return [replies[0]._replace(tensors=before[replies[0].client].tensors), *replies[1:]]
        before.update({reply.client: reply for reply in replies if op == TRAIN})
        return replies

    wire = Wire(fault=fault)
    assert wire.round(names, 0).of
    reply = wire.round(names, 1)
    assert not reply.of and "not of the silos and the round" in reply.lost["s00"]


def test_one_silos_update_in_the_place_of_the_sum_is_not_opened():
    wire = Wire()
    wire.round(names_of(4))
    asked = next(request for request, _ in wire.seen if request.op == OPEN)
    alone = next(reply for request, reply in wire.seen if request.op == TRAIN).tensors[CIPHER]
    with pytest.raises(Refused, match="not of the silos"):
        wire.client(asked._replace(tensors={**asked.tensors, CIPHER: alone}), silo_of(asked.client))


def test_a_silo_opens_one_sum_a_round():
    wire = Wire()
    wire.round(names_of(4))
    asked, said = next((request, reply) for request, reply in wire.seen if request.op == OPEN)
    silo = silo_of(asked.client, wire.memory[asked.client])
    assert torch.equal(wire.client(asked, silo)[0].tensors[OPENED], said.tensors[OPENED])
    other = {**asked.tensors, CIPHER: asked.tensors[CIPHER] + 1}
    with pytest.raises(Refused, match="answered once"):
        wire.client(asked._replace(tensors=other), silo)


def test_a_sum_of_fewer_than_is_stated_or_of_others_is_not_opened():
    wire = Wire(Settings(least=4, largest_weight=50))
    wire.round(names_of(4))
    asked = next(request for request, _ in wire.seen if request.op == OPEN)
    names = dict.fromkeys(asked.tensors)
    assert f"{PART}/names.utf8" in names
    fewer = {
        f"{PART}/names.utf8": asked.tensors[f"{PART}/names.utf8"][:9],
        f"{PART}/names.ends": torch.tensor([3, 6, 9]),
    }
    with pytest.raises(Refused, match="3 silos is not told"):
        wire.client(asked._replace(tensors={**asked.tensors, **fewer}), silo_of("s00"))
    with pytest.raises(Refused, match="with this one among them"):
        wire.client(asked, silo_of("s09"))


def test_a_silo_with_another_key_spoils_the_round_and_not_the_sum():
    wire, stranger = Wire(), Wire(key=b"x" * 32)

    class Mixed(Wire):
        def answer(self, request):
            return (stranger if request.client == "s01" else wire).answer(request)

    reply = Mixed().round(names_of(4))
    assert not reply.of and "another key" in reply.lost["s00"]


def test_who_does_not_open_is_stood_in_for_and_two_that_differ_are_not_believed():
    names = names_of(4)

    def silent(op, replies):
        return [reply for reply in replies if op == TRAIN or reply.client != "s00"]

    assert near(Wire(fault=silent).round(names), names, lambda name: 1.0, USUAL, 4)

    def lying(op, replies):
        if op == TRAIN:
            return replies
        return [replies[0]._replace(tensors={OPENED: replies[0].tensors[OPENED] + 1}), *replies[1:]]

    reply = Wire(fault=lying).round(names)
    assert not reply.of and "'s00' and 's01' find different numbers" in reply.lost["s03"]


def test_a_weight_of_a_thousand_million_counts_as_the_largest_that_is_stated():
    weights = {"s00": 1e9, "s01": 30.0, "s02": 5.4, "s03": 0.2}
    exact = {"s00": 50.0, "s01": 30.0, "s02": 5.0, "s03": 1.0}
    assert near(Wire(weight=weights.__getitem__).round(list(weights)), list(weights), exact.__getitem__, USUAL, 4)


def test_values_beyond_the_largest_are_brought_down_to_it_and_do_not_wrap():
    class Large(Wire):
        def train(self, request, silo):
            return Reply(silo.name, request.round, {key: torch.full_like(v, 9.0) for key, v in LIKE.items()}, 1.0), {}

    for bits in (16, 32):
        reply = Large(Settings(bits=bits), weighted=False).round(names_of(5))
        assert all(bool(((value - 1.0).abs() < 1e-3).all()) for value in reply.tensors.values())


def test_a_round_adds_up_as_without_and_the_plan_says_what_is_seen():
    def client(request, silo):
        made = {key: torch.full(value.shape, 0.01 * silo.seed) for key, value in LIKE.items()}
        return Reply(silo.name, request.round, made, 3.0), {}

    found = {}
    for name, tensors in {"plain": None, "sum": ["*"], "part": ["a"]}.items():
        chosen = Settings(tensors=tensors or [])
        layers = [homomorphic_sum(chosen, KEY, SECRET, 1.0, lambda number: LIKE)] if tensors else []
        made = averaging(
            work=Work(client), select=lambda number: names_of(4), aggregate=mean(), transforms=[clip(1.0)],
            middleware=layers,
        )  # fmt: skip
        state, report = made.server(made.init(LIKE), local(made.client, silo_of, {}))
        found[name] = state.params
        assert report == {"clients": 4, "asked": 4}
        if layers:
            assert layers[0].claim(Facts(norm_bound=1.0)).sees == name
            assert set(layers[0].wire(LIKE)) == ({CIPHER} if name == "sum" else {CIPHER, "b"})
    for name in ("sum", "part"):
        assert all(torch.allclose(found[name][key], found["plain"][key], atol=1e-4) for key in LIKE)


def test_a_batch_of_clients_adds_up_as_each_does_alone():
    wire = Wire()
    names = names_of(4)
    reply = wire.round(names)
    batch = wire.layer.cohort(lambda members: [wire.train(*member) for member in members])
    memory = {}

    def together(requests):
        for answer, kept in batch(
            [(request, silo_of(request.client, memory.get(request.client))) for request in requests]
        ):
            memory[answer.client] = kept
            yield answer

    (other,) = wire.layer.exchange(together)([Request(name, 0, TRAIN, LIKE) for name in names])
    assert list(other.of) == names and all(torch.equal(reply.tensors[key], other.tensors[key]) for key in LIKE)


REFUSED = {
    "no clip": (dict(bound=None), "add \\[\\[transforms\\]\\] name = 'clip'"),
    "a name that is not there": (dict(settings=Settings(tensors=["lora_*"])), "there are 'a', 'b'"),
    "too large": (dict(like=lambda number: {"a": torch.empty(10**8, device="meta")}), "256 MB is the most"),
    "no weight": (dict(settings=Settings(largest_weight=0.5)), "largest_weight is 0.5"),
}


@pytest.mark.parametrize(("changes", "said"), REFUSED.values(), ids=REFUSED)
def test_what_does_not_fit_is_refused_with_the_remedy(changes, said):
    usual = dict(settings=USUAL, key=KEY, secret=SECRET, bound=1.0, like=lambda number: LIKE)
    with pytest.raises(FedllmError, match=said):
        homomorphic_sum(**{**usual, **changes})


def test_as_many_ciphertexts_as_are_allowed_are_no_more_than_it_says():
    values = MOST_BYTES // (2 * 4096 * 8) * 2044 - 2
    for size, fits in ((values, True), (values + 1, False)):
        like = {"a": torch.empty(size, device="meta")}
        try:
            homomorphic_sum(USUAL, KEY, SECRET, 1.0, lambda number, like=like: like)
            assert fits
        except FedllmError:
            assert not fits


def test_the_modulus_is_tenseals_and_a_key_is_the_same_wherever_its_bytes_are():
    from fedllm.exchange.homomorphic.ckks import SLOTS, add, decrypted, encrypted, opened

    one, other = opened(KEY), opened(KEY)
    numbers = np.random.default_rng(0).integers(-(2**21), 2**21, (2, SLOTS))
    total = encrypted(one, numbers)
    for _ in range(9):
        add(total, encrypted(other, numbers))
    assert np.array_equal(decrypted(other, total), 10 * numbers)
