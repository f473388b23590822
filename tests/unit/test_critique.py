"""A prompt is mended by what it gets wrong, within what it may take."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from fedllm.algorithms.budget import Budget
from fedllm.algorithms.critique import ROOM, mended
from fedllm.algorithms.trying import WRITTEN
from fedllm.silo.endpoint import Unanswered
from fedllm.silo.questions import asking
from fedllm.silo.scoring import Scored
from fedllm.silo.speaker import Speaker, Used

ASKING = asking({"name": "classify", "words": {"1": "good", "0": "bad"}, "template": "{text}\nIs:"})
ROWS = [{"text": f"film {i}", "label": "10"[i == 1]} for i in range(3)]
QUESTIONS = ASKING.read(ROWS, "here")
PLENTY = Budget(1000, 1_000_000)


def optimist(heard, fails_at=None):
    """A model that finds everything good, and takes as many tokens as a text has bytes and as it may write."""
    used = [Used()]

    def note(calls, read, written):
        used[0] = Used(used[0].calls + calls, used[0].read + read, used[0].written + written)

    def score(pairs):
        note(len(pairs), sum(len((a + b).encode()) + 1 for a, b in pairs), 0)
        return [Scored(-1.0 if after == " good" else -2.0, 1, 4) for _, after in pairs]

    def write(conversations, how):
        texts = [turns[0].content for turns in conversations]
        heard.extend(texts)
        if len(heard) == fails_at:
            raise Unanswered("away")
        note(1, sum(len(text.encode()) + ROOM for text in texts), how.max_tokens)
        return [f' "Said\n{len(heard)}" ' for _ in texts]

    return Speaker(write, score, lambda: used[0])


def test_the_critique_sees_what_is_wrong_and_the_edit_sees_the_critique():
    heard = []
    found = mended(optimist(heard), ASKING, "Look.", QUESTIONS, 0, PLENTY)
    critique, edit = heard
    assert "Text: film 1\nRight: bad\nGiven: good" in critique and "film 0" not in critique and "Look." in critique
    assert "Said 1" in edit and "film" not in edit
    assert found.texts == ["Said 2"] and found.spent.calls == 3 + 2 and found.answered


def test_where_all_is_right_nothing_is_written():
    heard = []
    found = mended(optimist(heard), ASKING, "Look.", QUESTIONS[:1], 0, PLENTY)
    assert found.texts == [] and found.spent.calls == 1 and heard == []


def test_a_model_that_falls_silent_costs_what_was_asked_of_it():
    found = mended(optimist([], fails_at=2), ASKING, "Look.", QUESTIONS, 0, PLENTY)
    assert found.texts == [] and found.spent.calls == 3 + 2 and not found.answered


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 8), st.integers(0, 1500))
def test_no_more_is_taken_than_there_is_room_for(calls, tokens):
    found = mended(optimist([]), ASKING, "Look.", QUESTIONS, 0, Budget(calls, tokens))
    assert found.spent.calls <= calls and found.spent.tokens <= tokens
    whole = mended(optimist([]), ASKING, "Look.", QUESTIONS, 0, PLENTY).spent
    assert bool(found.texts) <= (calls >= whole.calls and tokens >= whole.tokens)
    assert found.texts or calls < whole.calls or tokens < whole.tokens + 2 * WRITTEN
