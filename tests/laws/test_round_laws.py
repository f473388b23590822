"""Laws of a round of real training, on a tiny model: what it equals, and what it must not touch."""

from __future__ import annotations

import pytest
import torch

from fedllm.core.aggregate import mean
from fedllm.core.optimisers import fedadam, fedavg
from fedllm.core.round import averaging
from fedllm.core.seeds import derive
from fedllm.core.types import Request, Silo
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.select import everyone
from fedllm.exchange.top_k import top_k
from fedllm.runtime.local import cohort, local
from fedllm.silo.examples import Example, collate, draws
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import full, lora, trained
from fedllm.silo.training import local_training
from tests.messages import pack_reply, pack_request, unpack_reply, unpack_request
from tests.tiny import tiny_model

VOCABULARY, PAD = 64, 0
NAMES = ["a", "b", "c"]
SEED = 11


def examples(count, seed, lengths=(4, 12)):
    draw = torch.Generator().manual_seed(seed)
    found = []
    for _ in range(count):
        length = int(torch.randint(*lengths, (1,), generator=draw)) if lengths[0] < lengths[1] else lengths[0]
        ids = torch.randint(3, VOCABULARY, (length,), generator=draw).tolist()
        found.append(Example(ids, ids))
    return found


DATA = {
    name: {"train": examples(count, number), "test": []}
    for number, (name, count) in enumerate(zip(NAMES, (6, 4, 9), strict=True))
}


def attached(trainable=None):
    model = (trainable or lora(4)).attach(tiny_model(VOCABULARY), 0)
    draw = torch.Generator().manual_seed(1)
    start = {n: v.detach() + 0.02 * torch.randn(v.shape, generator=draw) for n, v in trained(model).items()}
    return model, start


def rounds(algorithm, exchange, start, count):
    state = algorithm.init(start)
    for _ in range(count):
        state, _ = algorithm.server(state, exchange)
    return state


def one_by_one(algorithm, model, data, memory=None):
    memory = {} if memory is None else memory
    return local(algorithm.client, lambda name: Silo(name, model, data[name], {}, derive(SEED, name)), memory)


def bare_loop(model, start, rows, batches, batch_size, learning_rate, seed):
    """Train as anyone would, without a word of ours beyond the order of the rows."""
    params = trained(model)
    with torch.no_grad():
        for name, value in start.items():
            params[name].copy_(value)
    sgd = torch.optim.SGD(params.values(), learning_rate)
    for batch in draws(rows, batch_size, 0, batches, derive(seed, "order")):
        inputs = collate(batch, PAD, torch.device("cpu"))
        loss = model(input_ids=inputs.input_ids_BT, labels=inputs.labels_BT).loss
        sgd.zero_grad()
        loss.backward()
        sgd.step()
    return {name: value.detach().clone() for name, value in params.items()}


@pytest.mark.parametrize("trainable", [lora(4), full()], ids=lambda trainable: trainable.name)
def test_one_client_with_all_the_data_is_centralised_training(trainable):
    model, start = attached(trainable)
    rows = [row for name in NAMES for row in DATA[name]["train"]]
    work = local_training(
        causal_loss(), PAD, steps=3, batch_size=4, optimiser="sgd", learning_rate=0.05, max_grad_norm=0
    )
    algorithm = averaging(work=work, select=everyone(["all"]), aggregate=mean(), optimiser=fedavg(1.0))
    state = rounds(algorithm, one_by_one(algorithm, model, {"all": {"train": rows}}), start, 4)
    central = bare_loop(model, start, rows, 12, 4, 0.05, derive(SEED, "all"))
    moved = max(float((central[name] - start[name]).abs().max()) for name in start)
    assert moved > 1e-2
    for name in start:
        torch.testing.assert_close(state.params[name], central[name], rtol=0, atol=2e-5)


def test_one_step_of_every_client_is_data_parallel_training():
    # Equal tokens everywhere, so that the mean over clients is the mean over the union of their batches.
    data = {name: {"train": examples(4, number, (8, 8))} for number, name in enumerate(NAMES)}
    model, start = attached()
    work = local_training(
        causal_loss(), PAD, steps=1, batch_size=4, optimiser="sgd", learning_rate=0.1, max_grad_norm=0
    )
    algorithm = averaging(work=work, select=everyone(NAMES), aggregate=mean())
    state = rounds(algorithm, one_by_one(algorithm, model, data), start, 5)

    union = [row for name in NAMES for row in data[name]["train"]]
    # Each client reads all its rows at every step, so the union is one batch of all rows in any order.
    parallel = bare_loop(model, start, union, 5, 12, 0.1, 0)
    for name in start:
        torch.testing.assert_close(state.params[name], parallel[name], rtol=0, atol=1e-5)


def over_bytes(exchange):
    """Pass every message through bytes, as between machines."""

    def packed(requests):
        for reply in exchange([unpack_request(pack_request(request)) for request in requests]):
            yield unpack_reply(pack_reply(reply))

    return packed


TRANSFORMS = [clip(0.5), top_k(0.3), cast()]


@pytest.mark.parametrize("transforms", [[], TRANSFORMS], ids=["plain", "clip, top k, cast"])
def test_local_is_over_bytes_bit_for_bit_and_cohort_to_a_tolerance(transforms):
    model, start = attached()
    work = local_training(causal_loss(), PAD, steps=2, batch_size=3, optimiser="sgd", learning_rate=0.1)
    algorithm = averaging(
        work=work, select=everyone(NAMES), aggregate=mean(), optimiser=fedadam(), transforms=transforms
    )
    memories = [{}, {}, {}]

    def opened(name):
        return Silo(name, model, DATA[name], {}, derive(SEED, name))

    straight = rounds(algorithm, local(algorithm.client, opened, memories[0]), start, 3)
    packed = rounds(algorithm, over_bytes(local(algorithm.client, opened, memories[1])), start, 3)
    for one, other in zip(straight[1:], packed[1:], strict=True):
        assert one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)
    assert all(torch.equal(memories[0][s][n], memories[1][s][n]) for s in memories[0] for n in memories[0][s])
    if transforms:
        assert memories[0].keys() == set(NAMES)
        return
    # In one batch sums have another order, and Adam divides by what may be small.
    batched = rounds(algorithm, cohort(algorithm.cohort, opened, memories[2], 2), start, 3)
    for name in start:
        torch.testing.assert_close(straight.params[name], batched.params[name], rtol=0, atol=1e-4)


def test_a_run_that_starts_again_from_its_state_goes_on_with_the_same_bits():
    model, start = attached()
    work = local_training(causal_loss(), PAD, steps=2, batch_size=3)
    algorithm = averaging(
        work=work, select=everyone(NAMES), aggregate=mean(), optimiser=fedadam(), transforms=[top_k(0.3)]
    )
    straight = rounds(algorithm, one_by_one(algorithm, model, DATA, {}), start, 4)
    memory = {}
    half = rounds(algorithm, one_by_one(algorithm, model, DATA, memory), start, 2)
    fresh, _ = attached()
    exchange = one_by_one(algorithm, fresh, DATA, dict(memory))
    for _ in range(2):
        half, _ = algorithm.server(half, exchange)
    assert all(torch.equal(straight.params[name], half.params[name]) for name in start)


@pytest.mark.parametrize("optimiser", ["sgd", "adamw"])
def test_accumulated_gradients_are_those_of_the_whole_batch(optimiser):
    model, start = attached()
    silo = Silo("a", model, DATA["a"], {}, 5)
    settings = {"steps": 2, "batch_size": 4, "optimiser": optimiser, "learning_rate": 1e-2}
    whole, *parts = (
        local_training(causal_loss(), PAD, micro_batch=micro, **settings).client(Request("a", 0, "train", start), silo)[
            0
        ]
        for micro in (None, 1, 2, 3, 4)
    )
    for reply in parts:
        assert reply.scalars["tokens"] == whole.scalars["tokens"]
        assert reply.scalars["train_loss"] == pytest.approx(whole.scalars["train_loss"], rel=1e-5)
        for name in start:
            torch.testing.assert_close(reply.tensors[name], whole.tensors[name], rtol=0, atol=1e-5)


def client_update(model, start, **settings):
    work = local_training(causal_loss(), PAD, batch_size=4, optimiser="sgd", max_grad_norm=0, **settings)
    return work.client(Request("a", 0, "train", start), Silo("a", model, DATA["a"], {}, 5))[0].tensors


def length(update):
    return float(sum(value.square().sum() for value in update.values()) ** 0.5)


def test_fedprox_without_its_term_is_fedavg_and_with_a_large_one_stays_close():
    model, start = attached()
    free = client_update(model, start, steps=6, learning_rate=0.05)
    none = client_update(model, start, steps=6, learning_rate=0.05, proximal=0.0)
    assert all(torch.equal(free[name], none[name]) for name in free)
    lengths = [length(client_update(model, start, steps=6, learning_rate=0.05, proximal=mu)) for mu in (0.0, 1.0, 5.0)]
    assert lengths[0] > lengths[1] > lengths[2] > 0


def test_the_proximal_gradient_by_hand():
    # Two steps of SGD from w: w1 = w - lr g(w);  w2 = w1 - lr (g(w1) + mu (w1 - w)). Without the term
    # w2' = w1 - lr g(w1), so w2 - w2' = -lr mu (w1 - w) = lr mu (start - end of the first step alone).
    model, start = attached()
    rate, mu = 0.05, 3.0
    first = client_update(model, start, steps=1, learning_rate=rate)
    assert all(
        torch.equal(first[n], client_update(model, start, steps=1, learning_rate=rate, proximal=mu)[n]) for n in first
    )
    free = client_update(model, start, steps=2, learning_rate=rate)
    pulled = client_update(model, start, steps=2, learning_rate=rate, proximal=mu)
    for name in start:
        torch.testing.assert_close(pulled[name] - free[name], -rate * mu * first[name], rtol=0, atol=1e-6)


@pytest.mark.parametrize("trainable", [lora(4), full()], ids=lambda trainable: trainable.name)
def test_a_client_changes_nothing_that_it_was_sent(trainable):
    model, start = attached(trainable)
    copy = {name: value.clone() for name, value in start.items()}
    work = local_training(causal_loss(), PAD, steps=2, batch_size=2, proximal=0.1)
    silo = Silo("a", model, DATA["a"], {"x": torch.ones(1)}, 5)
    ways = [lambda: work.client(Request("a", 0, "train", start), silo)]
    if trainable.adapter:
        ways.append(lambda: work.cohort([(Request("a", 0, "train", start), silo)] * 2))
    for way in ways:
        way()
        assert all(torch.equal(start[name], copy[name]) for name in start)
        assert torch.equal(silo.memory["x"], torch.ones(1))


def test_a_client_is_a_function_of_request_and_silo():
    model, start = attached(lora(4, dropout=0.3))
    work = local_training(causal_loss(), PAD, steps=2, batch_size=2)

    def once(number, seed):
        return work.client(Request("a", number, "train", start), Silo("a", model, DATA["a"], {}, seed))[0].tensors

    one = once(0, 5)
    once(3, 9)
    again = once(0, 5)
    assert all(torch.equal(one[name], again[name]) for name in one)
    assert any(not torch.equal(one[name], once(1, 5)[name]) for name in one)
    assert any(not torch.equal(one[name], once(0, 6)[name]) for name in one)
