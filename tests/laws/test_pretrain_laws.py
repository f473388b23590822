"""Laws of pre-training in rounds, on a tiny model: what DiLoCo equals, with fragments, drop-outs and kills as well."""

from __future__ import annotations

import json

import pytest
import torch

import fedllm
from fedllm.app.build import build
from fedllm.app.config import read_recipe
from fedllm.app.plan_view import plan_lines
from fedllm.app.run import resume
from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.optimisers import nesterov
from fedllm.core.round import averaging
from fedllm.core.seeds import derive
from fedllm.core.types import Silo
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.fragments import fragments
from fedllm.exchange.select import everyone
from fedllm.exchange.top_k import top_k
from fedllm.runtime.local import cohort, local
from fedllm.runtime.store import Checkpoint, load_checkpoint, save_checkpoint
from fedllm.silo.examples import Example, collate, draws
from fedllm.silo.objective import causal_loss
from fedllm.silo.trainables import full, lora, parameters, trained
from fedllm.silo.training import local_training
from tests.messages import pack_reply, pack_request, unpack_reply, unpack_request
from tests.tiny import tiny_model, write_model, write_rows

VOCABULARY, PAD, SEED = 64, 0, 11
NAMES = ["a", "b", "c"]


def examples(count, seed):
    """Rows of unequal length, of every silo another."""
    draw = torch.Generator().manual_seed(seed)
    rows = [torch.randint(3, VOCABULARY, (4 + seed + n % 3,), generator=draw).tolist() for n in range(count)]
    return [Example(ids, ids) for ids in rows]


DATA = {name: {"train": examples(4 + place, place), "test": []} for place, name in enumerate(NAMES)}


def fresh(trainable=None):
    model = (trainable or full()).attach(tiny_model(VOCABULARY), 0)
    return model, parameters(model)


def opening(model):
    return lambda name: Silo(name, model, DATA[name], {}, derive(SEED, name))


def training(**settings):
    return local_training(causal_loss(), PAD, **{"batch_size": 4, "max_grad_norm": 0, **settings})


def rounds(algorithm, exchange, state, until):
    while state.round < until:
        state, _ = algorithm.server(state, exchange)
    return state


def batches(name, batch_size, count, first=0):
    for rows in draws(DATA[name]["train"], batch_size, first, count, derive(derive(SEED, name), "order")):
        yield collate(rows, PAD, torch.device("cpu"))


def loss_of(model, batch):
    return model(input_ids=batch.input_ids_BT, labels=batch.labels_BT.where(batch.labels_BT >= 0, -100)).loss


def put(params, values):
    with torch.no_grad():
        for name, value in values.items():
            params[name].copy_(value)


def close(ours, theirs, start, allowed):
    assert max(float((theirs[name] - start[name]).abs().max()) for name in start) > 100 * allowed
    for name in start:
        torch.testing.assert_close(ours[name], theirs[name], rtol=0, atol=allowed)


def test_one_inner_step_of_sgd_and_outer_sgd_of_1_are_data_parallel_sgd():
    # Weighted by tokens, the silos' mean gradients are the gradient of all their batches together.
    model, start = fresh()
    work = training(steps=1, optimiser="sgd", learning_rate=0.2, weight="tokens")
    algorithm = averaging(work=work, select=everyone(NAMES), aggregate=mean(), optimiser=nesterov(1.0, momentum=0.0))
    state = rounds(algorithm, local(algorithm.client, opening(model), {}), algorithm.init(start), 5)

    params = trained(model)
    put(params, start)
    sgd = torch.optim.SGD(params.values(), 0.2)
    for together in zip(*(batches(name, 4, 5) for name in NAMES), strict=True):
        sgd.zero_grad()
        tokens = [int(batch.tokens_B.sum()) for batch in together]
        for batch, own in zip(together, tokens, strict=True):
            (loss_of(model, batch) * own / sum(tokens)).backward()
        sgd.step()
    assert len(set(tokens)) == len(NAMES)
    close(state.params, {name: value.detach() for name, value in params.items()}, start, 2e-6)


@pytest.mark.parametrize("share", [None, fragments(1), fragments(2)], ids=["everything", "one fragment", "fragments"])
def test_one_silo_and_outer_sgd_of_1_are_plain_training(share):
    model, start = fresh()
    work = training(
        steps=3, rounds=4, learning_rate=3e-3, weight_decay=0.1, schedule="cosine", warmup=2, keep_optimiser=True
    )
    algorithm = averaging(
        work=work, select=everyone(["a"]), aggregate=mean(), optimiser=nesterov(1.0, momentum=0.0), share=share
    )
    memory = {}
    state = rounds(algorithm, local(algorithm.client, opening(model), memory), algorithm.init(start), 4)
    ours = state.params
    if share is not None and share.period > 1:
        # The fragment that had its turn in the round before goes on at the silo until the next.
        ours = {name: memory["a"][f"work/own/{name}"] for name in start}

    params = trained(model)
    put(params, start)
    adamw = torch.optim.AdamW(params.values(), 3e-3, weight_decay=0.1)
    cosine = [0.5, 1.0, *(0.5 + 0.5 * torch.arange(10).mul(torch.pi / 10).cos()).tolist()]
    for rate, batch in zip(cosine, batches("a", 4, 12), strict=True):
        adamw.param_groups[0]["lr"] = 3e-3 * rate
        adamw.zero_grad()
        loss_of(model, batch).backward()
        adamw.step()
    close(ours, {name: value.detach() for name, value in params.items()}, start, 3e-5)


def diloco(model, start, count, steps, rate):
    """Algorithm 1 of the paper with torch's own optimisers: a replica a silo, AdamW inside, Nesterov outside."""
    outer = {name: torch.nn.Parameter(value.clone()) for name, value in start.items()}
    step_outside = torch.optim.SGD(outer.values(), 0.7, momentum=0.9, nesterov=True)
    params, examples_of = trained(model), [len(DATA[name]["train"]) for name in NAMES]
    inner = {name: torch.optim.AdamW(params.values(), rate) for name in NAMES}
    for number in range(count):
        for value in outer.values():
            value.grad = torch.zeros_like(value)
        for name, weight in zip(NAMES, examples_of, strict=True):
            put(params, {key: value.detach() for key, value in outer.items()})
            for batch in batches(name, 4, steps, number * steps):
                inner[name].zero_grad()
                loss_of(model, batch).backward()
                inner[name].step()
            for key, value in outer.items():
                value.grad += (value.detach() - params[key].detach()) * weight / sum(examples_of)
        step_outside.step()
    return {name: value.detach() for name, value in outer.items()}


def test_a_run_is_algorithm_1_of_diloco():
    model, start = fresh()
    work = training(steps=3, learning_rate=1e-3, weight_decay=0.01, keep_optimiser=True)
    algorithm = averaging(work=work, select=everyone(NAMES), aggregate=mean(), optimiser=nesterov())
    state = rounds(algorithm, local(algorithm.client, opening(model), {}), algorithm.init(start), 4)
    close(state.params, diloco(model, start, 4, 3, 1e-3), start, 3e-5)


def whole_run(model, transforms=(), **share):
    work = training(steps=2, rounds=6, schedule="linear", warmup=0.2, keep_optimiser=True, max_grad_norm=1.0)
    return averaging(
        work=work,
        select=everyone(NAMES),
        aggregate=mean(),
        optimiser=nesterov(0.7, 0.9, warmup=2),
        share=fragments(2, **share),
        transforms=transforms,
    )


SHARES = [{}, {"delay": 1, "mixing": 0.5}, {"pattern": "sequential", "embeddings": "apart", "delay": 2, "mixing": 0.25}]
TRANSFORMS = [clip(0.5), top_k(0.3), cast()]


def same(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


def over_bytes(exchange, lost=()):
    def packed(requests):
        for reply in exchange([unpack_request(pack_request(request)) for request in requests]):
            if (reply.round, reply.client) not in lost:
                yield unpack_reply(pack_reply(reply))

    return packed


@pytest.mark.parametrize("share", SHARES, ids=str)
def test_fragments_compose_with_transforms_bytes_losses_and_kills(share, tmp_path):
    model, start = fresh()
    algorithm = whole_run(model, TRANSFORMS, **share)
    lost, memory = {(1, "b"), (3, "a")}, {}
    straight = rounds(
        algorithm, over_bytes(local(algorithm.client, opening(model), memory), lost), algorithm.init(start), 6
    )
    state, held = algorithm.init(start), {}
    for until in range(1, 7):
        # A new process after every round: another model, and all that is known from the disk.
        way = over_bytes(local(algorithm.client, opening(fresh()[0]), held), lost)
        state = rounds(algorithm, way, state, until)
        save_checkpoint(tmp_path, Checkpoint(state, held))
        kept = load_checkpoint(tmp_path)
        state, held = kept.state, dict(kept.memory)
    assert all(same(one, other) for one, other in zip(straight[1:], state[1:], strict=True))
    assert all(same(memory[name], held[name]) for name in NAMES)


def test_a_cohort_with_fragments_and_kept_optimisers_is_its_clients_one_by_one():
    model, start = fresh(lora(4))
    algorithm = whole_run(model, delay=1)
    alone = rounds(algorithm, local(algorithm.client, opening(model), {}), algorithm.init(start), 5)
    batch = rounds(algorithm, cohort(algorithm.cohort, opening(model), {}, 3), algorithm.init(start), 5)
    for name in start:
        torch.testing.assert_close(alone.params[name], batch.params[name], rtol=0, atol=2e-4)


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pretrain")
    write_model(folder / "model")
    for name in "ab":
        rows = [{"text": f"{name} says that the cat sat on mat number {n}"} for n in range(24)]
        write_rows(folder / f"{name}.jsonl", rows)
    return folder


def recipe(place, **changes):
    table = {
        "model": str(place / "model"),
        "dtype": "float32",
        "device": "cpu",
        "rounds": 4,
        "silos": {name: f"{name}.jsonl" for name in "ab"},
        "data": {"root": str(place)},
        "task": {"name": "causal", "block": 16},
        "trainable": {"name": "full"},
        "client": {"steps": 2, "batch_size": 4, "keep_optimiser": True, "betas": [0.9, 0.95], "schedule": "cosine"},
        "optimiser": {"name": "nesterov", "schedule": "linear", "floor": 0.5},
        "share": {"name": "fragments", "count": 2, "delay": 1, "mixing": 0.5},
        "transforms": [{"name": "cast"}],
    }
    for path, value in changes.items():
        table.setdefault(path, {}).update(value) if isinstance(value, dict) else table.update({path: value})
    return table


SUMS = {"secure": {"least": 3}, "evaluate": {"alone": False}, "transforms": [{"name": "clip", "max_norm": 1.0}]}


@pytest.mark.parametrize(
    ("changes", "ahead"),
    [
        ({}, True),
        ({"share": {"delay": 0}}, False),
        ({"silos": {"c": "a.jsonl"}, **SUMS}, False),
    ],
)
def test_the_plan_says_that_far_sites_begin_the_next_round_early(place, changes, ahead):
    table = read_recipe(recipe(place, **changes))
    here, far = (plan_lines(build(table, weights=False, elsewhere=names)) for names in ((), ["a", "b", "c"]))
    assert any(line.startswith("overlap ") for line in far) == ahead
    assert not any(line.startswith("overlap ") for line in here)


def test_a_recipe_streams_fragments_and_goes_on_after_a_stop(place, tmp_path):
    straight = fedllm.run(recipe(place), tmp_path / "straight")
    events = [json.loads(line) for line in (straight / "events.jsonl").read_text().splitlines()]
    up = {event["bytes_up"] for event in events if event["event"] == "round"}
    (begun,) = [event for event in events if event["event"] == "start"]
    assert begun["plan"]["steps"][0]["name"] == "select and share: 2 fragments, 1 late, mixed by 0.5"
    assert max(up) < 2 * 1.2 * begun["plan"]["bytes_up"] and begun["plan"]["bytes_up"] < 2 * begun["plan"]["parameters"]

    stopped = fedllm.run(recipe(place), tmp_path / "stopped")
    for path in sorted((stopped / "checkpoints").glob("*"))[1:]:
        path.unlink()
    resume(stopped)
    weights = [(folder / "model" / "model.safetensors").read_bytes() for folder in (straight, stopped)]
    assert weights[0] == weights[1]


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"share": {"count": 3}}, "share.count is 3 but what is trained has 2 layers"),
        ({"share": {"layers": [[0], [2]]}}, "share never visits layer 1"),
        ({"rounds": 1}, "has 1 rounds and share takes 2"),
        ({"client": {"steps": 0}}, "client.steps is 0"),
        ({"share": {"counts": 3}}, "did you mean 'count'"),
        ({"client": {"betas": [0.9]}}, "client.betas"),
    ],
    ids=str,
)
def test_what_makes_no_sense_is_refused_before_anything_is_trained(place, changes, reason):
    with pytest.raises(FedllmError, match=reason):
        build(read_recipe(recipe(place, **changes)), weights=False)
