"""Layers are scored by hand-checkable numbers, the best are exchanged, and the others stay."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.algorithms.scored_layers import KEY, best, scored_layers
from fedllm.core.aggregate import mean
from fedllm.core.errors import FedllmError
from fedllm.core.optimisers import fedavgm
from fedllm.core.plan import plan
from fedllm.core.round import averaging
from fedllm.core.types import Reply, Silo
from fedllm.exchange.select import everyone
from fedllm.runtime.local import local
from fedllm.silo.examples import Example
from fedllm.silo.keeping import keeping, own_of
from fedllm.silo.layer_scores import SMALL, distinctness, layer_scores
from fedllm.silo.objective import causal_loss
from fedllm.silo.prompts import prefix, prompt
from fedllm.silo.trainables import parameters
from fedllm.silo.training import local_training
from tests.tiny import tiny_model

draw = torch.Generator().manual_seed(0)
ROWS = [Example(ids, ids) for size in (5, 9, 7, 6) for ids in torch.randint(3, 307, (1, size), generator=draw).tolist()]
LAYERS = 4
NAME = "prompt_encoder.default.layers.{}.weight"


def in_double(*rows):
    return torch.tensor(rows, dtype=torch.float64)


def test_the_score_of_two_rows_by_hand():
    # Cosine 3/5: eigenvalues 8/5 and 2/5; lengths do not count.
    by_hand = math.log(1.6) + 1 / 1.6 + math.log(0.4) + 1 / 0.4
    assert float(distinctness(in_double([2.0, 0.0], [3.0, 4.0]))) == pytest.approx(by_hand, abs=1e-3)
    assert float(distinctness(in_double([1.0, 0.0], [0.0, 7.0]))) == pytest.approx(2.0, abs=1e-6)
    alike = math.log(2) + 0.5 + math.log(SMALL) + 1 / SMALL
    assert float(distinctness(in_double([1.0, 2.0], [2.0, 4.0]))) == pytest.approx(alike, rel=1e-3)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("made", [prefix, prompt])
def test_a_row_is_its_last_tokens_state_whatever_stands_beside_it(made):
    model = made(3).attach(tiny_model(layers=LAYERS), 0)
    each = []
    for row in ROWS:
        hidden = model(input_ids=torch.tensor([row.input_ids]), use_cache=False, output_hidden_states=True)
        each.append([layer[0, -1].double() for layer in hidden.hidden_states[1:]])
    by_hand = [float(distinctness(torch.stack([row[layer] for row in each]))) for layer in range(LAYERS)]
    assert layer_scores(model, ROWS, 0).tolist() == pytest.approx(by_hand, rel=1e-4)


def test_the_best_layers_are_the_highest_and_the_lower_of_equals():
    assert best(torch.tensor([1.0, 4.0, 2.0, 4.0]), [0, 1, 2, 3], 2) == [1, 3]
    assert best(torch.tensor([1.0, 4.0, 4.0, 4.0]), [0, 2, 5, 7], 2) == [2, 5]


class Run:
    """A federation of three silos whose scores are given, which is all that is not real here."""

    def __init__(self, scores, every=0, count=2):
        self.model = prefix(2).attach(tiny_model(layers=LAYERS), 0)
        self.first, self.memory, self.carried = parameters(self.model), {}, []
        self.scores, self.order = scores, list(scores)
        work = keeping(local_training(causal_loss(), 0, steps=2, batch_size=2, learning_rate=1e-2), self.first)
        self.algorithm = averaging(
            work=work,
            select=everyone(list(scores)),
            aggregate=mean(),
            share=scored_layers(count, every=every),
            optimiser=fedavgm(1.0, 0.5),
        )
        self.state = self.algorithm.init(self.first)

    def silo(self, name):
        return Silo(name, self.model, {"train": ROWS, "test": []}, {}, ord(name))

    def exchange(self, requests):
        self.carried.append((requests[0].op, list(requests[0].tensors)))
        if requests[0].op == "train":
            return local(self.algorithm.client, self.silo, self.memory)(requests)
        known = {request.client: request.round for request in requests}
        return iter(
            Reply(name, known[name], {"scores": torch.tensor(self.scores[name][0], dtype=torch.float64)}, weight)
            for name, weight in ((name, self.scores[name][1]) for name in self.order)
        )

    def round(self):
        self.state, report = self.algorithm.server(self.state, self.exchange)
        return report


@pytest.mark.filterwarnings("ignore")
def test_the_mean_score_by_examples_chooses_and_only_those_layers_travel():
    # By hand: (1 * a + 3 * b) / 4 = [2.5, 1.75, 3.25, 2.5], so layers 2 and, the lower of equals, 0.
    run = Run({"a": ([1.0, 4.0, 1.0, 4.0], 1.0), "b": ([3.0, 1.0, 4.0, 2.0], 3.0)})
    report = run.round()
    assert run.state.transforms[KEY].tolist() == [2.5, 1.75, 3.25, 2.5]
    assert report["layers"] == "0, 2" and report["clients"] == 2
    chosen = [NAME.format(0), NAME.format(2)]
    assert run.carried == [("score", list(run.first)), ("train", chosen)]
    moved = [name for name, value in run.state.params.items() if not torch.equal(value, run.first[name])]
    assert moved == chosen and list(run.state.params) == list(run.first)
    # The others were trained at each silo, and stay there.
    assert list(own_of(run.memory["a"])) == [NAME.format(1), NAME.format(3)]
    kept = own_of(run.memory["a"])[NAME.format(1)].clone()
    assert not torch.equal(kept, run.first[NAME.format(1)])
    run.round()
    assert run.carried[2:] == [("train", chosen)]
    assert not torch.equal(own_of(run.memory["a"])[NAME.format(1)], kept)


@pytest.mark.filterwarnings("ignore")
def test_scored_again_other_layers_may_travel_and_a_silo_goes_on_from_its_own():
    run = Run({"a": ([9.0, 0.0, 0.0, 0.0], 1.0)}, every=2, count=1)
    run.round(), run.round()
    own = own_of(run.memory["a"])[NAME.format(1)].clone()
    first = run.memory["a"][f"work/sent/{NAME.format(0)}"].clone()
    run.scores = {"a": ([0.0, 9.0, 0.0, 0.0], 1.0)}
    run.round()
    assert [op for op, _ in run.carried] == ["score", "train", "train", "score", "train"]
    assert run.carried[-1] == ("train", [NAME.format(1)])
    # Layer 1 begins at the server's value, and layer 0, no longer sent, at what the silo made of it.
    ended = own_of(run.memory["a"])[NAME.format(0)]
    assert 0 < float((ended - first).abs().max()) < 0.1
    assert not torch.equal(run.state.params[NAME.format(1)], own)


@pytest.mark.filterwarnings("ignore")
def test_the_order_of_arrival_leaves_no_trace_and_rubbish_is_dropped_and_named():
    scores = {"a": ([0.1, 0.2, 0.3, 0.4], 3.0), "b": ([0.7, 0.1, 0.2, 0.9], 5.0), "c": ([1e9, 0.3, 0.1, 0.6], 7.0)}
    one, other = Run(scores), Run(scores)
    other.order = ["c", "a", "b"]
    one.round(), other.round()
    assert torch.equal(one.state.transforms[KEY], other.state.transforms[KEY])
    for bad in ([float("nan")] * 4, [1.0] * 3):
        run = Run({**scores, "c": (bad, 7.0)})
        assert run.round()["unscored.c"] == "its scores are no finite number a layer"
        by_hand = [(3 * a + 5 * b) / 8 for a, b in zip(scores["a"][0], scores["b"][0], strict=True)]
        assert run.state.transforms[KEY].tolist() == pytest.approx(by_hand)
    with pytest.raises(FedllmError, match="no silo scored the layers"):
        Run({"a": ([math.inf] * 4, 1.0)}).round()


def test_a_plan_says_the_bytes_and_refuses_what_has_no_such_layers():
    def built(params, count):
        share = scored_layers(count)
        work = local_training(causal_loss(), 0)
        return plan(averaging(work=work, select=everyone(["a"]), aggregate=mean(), share=share), params)

    params = {NAME.format(layer): torch.zeros(2, 8) for layer in range(3)}
    assert built(params, 2).bytes_up == 2 * 2 * 8 * 4 and built(params, 2).bytes_down == 3 * 2 * 8 * 4
    with pytest.raises(FedllmError, match=r"share.layers is 4 but what is trained has 3 layers; lower it"):
        built(params, 4)
    with pytest.raises(FedllmError, match=r"has 0 layers; use trainable.name = 'prefix'"):
        built({"prompt_encoder.default.embedding.weight": torch.zeros(2, 8)}, 1)
    with pytest.raises(FedllmError, match=r"share.layers is 0"):
        scored_layers(0)
