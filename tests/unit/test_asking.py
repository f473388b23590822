"""Parts of the methods that send prompts, against numbers that can be checked by hand."""

from __future__ import annotations

import math

import pytest
import torch

from fedllm.algorithms import exemplars, self_consistency, templates
from fedllm.algorithms.asking import gathered, mean_of
from fedllm.algorithms.exemplars import tried
from fedllm.algorithms.self_consistency import agreed, think
from fedllm.core.errors import FedllmError, Refused
from fedllm.core.texts import as_tensors
from fedllm.core.types import Reply, Request
from fedllm.silo.answers import final
from fedllm.silo.asking import filled, measure
from fedllm.silo.questions import Question, asking
from fedllm.silo.scoring import Scored
from fedllm.silo.speaker import Speaker, Used

WORDS = {"n": "bad", "p": "good"}


def speaker(table=None, texts=()):
    """A model that scores by a table and writes these texts, one after the other; what it was asked is kept."""
    asked, said = [], iter(texts)

    def score(pairs):
        asked.extend(pairs)
        return [Scored(table[pair], 2, len(pair[1])) for pair in pairs]

    def write(conversations, writing):
        asked.extend(turns[-1].content for turns in conversations)
        return [next(said) for _ in conversations]

    return Speaker(write, score if table else None, Used), asked


def test_a_prompt_is_measured_by_its_words():
    task = asking({"name": "classify", "words": WORDS, "template": "{text} is"})
    table = {("x is", " bad"): math.log(0.1), ("x is", " good"): math.log(0.3), ("y is", " bad"): math.log(0.2),
             ("y is", " good"): math.log(0.4)}  # fmt: skip
    questions = [Question("x", "good", 1), Question("y", "bad", 2)]
    (found,) = measure(speaker(table)[0], task, [filled(task.template)], questions)
    assert found.value == pytest.approx((math.log(0.3 / 0.4) + math.log(0.2 / 0.6)) / 2)
    assert found.loss == pytest.approx(-(math.log(0.3) + math.log(0.2)) / 4)
    assert found.accuracy == 0.5


def test_where_nothing_is_scored_only_the_very_answer_is_right():
    task = asking({"name": "classify", "words": WORDS})
    questions = [Question(text, "good", 1) for text in "abc"]
    (found,) = measure(speaker(texts=["Good.", "good film", " GOOD"])[0], task, [filled("{text}")], questions)
    assert (found.value, found.loss, found.accuracy) == (pytest.approx(2 / 3), None, pytest.approx(2 / 3))


def test_each_thinks_several_times_and_takes_its_most_frequent_answer():
    model, asked = speaker(texts=["so 4", "so 5", "hm, 5.0", "one", "two", "two!"])
    thoughts = think(model, ["q", "r"], "before ", 3, 0.7, 9, 0)
    assert [(thought.chain, thought.answer) for thought in thoughts] == [("so 5", "5"), ("two", "two")]
    assert len(asked) == 6
    assert asked[0].startswith("before q")


def test_votes_are_decided_by_the_majority_and_with_noise_mostly():
    votes = {str(place): {7: "good" if place < 40 else "bad"} for place in range(50)}
    assert agreed(votes)[1:] == (["good"], [0.8])
    noisy = [agreed(votes, ["bad", "good", "never"], 0.5, seed) for seed in range(50)]
    assert sum(each.answers == ["good"] for each in noisy) > 45
    assert noisy[0].shares == [0.0]


def test_empty_places_are_filled_first_and_what_is_chosen_is_always_tried():
    sets = tried([3, -1, -1], 6, 4, 5, 0)
    assert sets[0] == [3, -1, -1]
    assert all(row[0] == 3 and row[1] in {0, 1, 2, 4, 5} and row[2] == -1 for row in sets[1:])
    assert len({tuple(row) for row in sets}) == 5
    assert all(row[0] == 3 and row[2] == 5 for row in tried([3, 4, 5], 6, 4, 1, 0)[1:])


def test_means_are_weighted_and_do_not_depend_on_who_came_first():
    scores, weights = {"a": [1.0, 0.1], "b": [4.0, 0.2]}, {"a": 1.0, "b": 3.0}
    assert mean_of(scores, weights) == pytest.approx([3.25, 0.175])
    assert mean_of(dict(reversed(scores.items())), weights) == mean_of(scores, weights)


def test_a_question_is_the_same_by_its_id_or_by_its_words():
    task = asking({"name": "instruct"})
    rows = [{"prompt": "The cat?", "response": "1"}, {"prompt": "the  CAT", "response": "1"}]
    one, other = task.read(rows, "x")
    assert one.number == other.number
    one, other = task.read([{**row, "id": place} for place, row in enumerate(rows)], "x")
    assert one.number != other.number


def exchange_of(*replies):
    return lambda requests: iter(replies)


def test_nothing_in_a_reply_is_trusted_and_those_who_sit_out_are_counted():
    def read(reply):
        if reply.client == "c":
            raise Refused("rubbish")
        return reply.client

    requests = [Request(name, 1, "train", {}) for name in "abcdef"]
    replies = [
        Reply("b", 1, {}, 1.0, {"copied": 2.0}),
        Reply("b", 1, {}, 1.0),
        Reply("x", 1, {}, 1.0),
        Reply("c", 1, {}, 1.0),
        Reply("d", 1, as_tensors("unanswered", ["timed out"]), 1.0),
        Reply("e", 1, {}, float("nan")),
        Reply("a", 1, {}, 1.0),
    ]
    found, report = gathered(exchange_of(*replies), requests, read)
    assert list(found) == ["a", "b"]
    assert report["copied.b"] == 2.0
    assert report["dropped.d"] == "its model did not answer: timed out"
    assert report["dropped.f"] == "no reply"
    assert (report["clients"], report["asked"]) == (2, 6)
    with pytest.raises(FedllmError, match="d: its model did not answer"):
        gathered(exchange_of(replies[4]), requests[3:4], read)


@pytest.mark.parametrize(
    ("read", "tensors"),
    [
        (lambda r: exemplars.read_scores(r, 2), {"scores": torch.zeros(3)}),
        (lambda r: exemplars.read_scores(r, 2), {"scores": torch.tensor([1.0, float("nan")])}),
        (lambda r: exemplars.read_scores(r, 2), {}),
        (lambda r: exemplars.read_shots(r, asking({"name": "classify", "words": WORDS}), 4),
         {**as_tensors("asked", ["a"]), **as_tensors("answered", ["ugly"])}),
        (lambda r: templates.read(r, 3, None, 1), {"vote": torch.tensor([3]), **as_tensors("new", [])}),
        (lambda r: templates.read(r, 3, 1.0, 1), {"vote": torch.tensor([1]), **as_tensors("new", ["{text}"] * 2)}),
        (lambda r: self_consistency.read_votes(r, 4), {"numbers": torch.ones(2).int(), **as_tensors("answers", ["a"])}),
        (lambda r: self_consistency.read_votes(r, 4), {"numbers": torch.ones(9).long(), **as_tensors("answers", "a")}),
    ],
)  # fmt: skip
def test_a_reply_of_another_shape_is_refused(read, tensors):
    with pytest.raises(Refused):
        read(Reply("a", 0, tensors, 1.0))


def test_a_library_keeps_the_best_says_who_added_what_and_counts_its_version():
    had = templates.Library(3, ["{text}a", "{text}b"], ["", "x"], [1, 2], [[-2.0], [-1.0]], [1.0, 2.0], 1)
    same = templates.grown(had, {"x": ["{text}b"]}, 4)
    assert same == had
    more = templates.grown(had, {"y": ["{text}c"], "x": ["{text}d"]}, 3)
    assert more.version == 4
    assert more.templates == ["{text}b", "{text}d", "{text}c"]
    assert more.added_by == ["x", "x", "y"]
    assert more.since == [2, 4, 4]
    assert more.best == 0


def test_an_answer_has_one_spelling():
    assert final("so it is $1,200.50!") == final("#### 1200.5 m") == "1200.5"
    assert final("The Cat.") == "cat"
