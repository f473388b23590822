"""A model behind an API: the same scores as in process, and what happens when it is down, slow, busy or wrong."""

from __future__ import annotations

import json
import time

import pytest
from starlette.applications import Starlette
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from fedllm.core.errors import FedllmError
from fedllm.evaluation.speaker import in_process
from fedllm.silo import endpoint as module
from fedllm.silo.endpoint import Address, Endpoint, Unanswered, ends, scored
from fedllm.silo.objective import causal_loss
from fedllm.silo.purse import Budget, Purse, Spent
from fedllm.silo.speaker import Used, Writing
from fedllm.silo.templates import Turn
from tests.endpoints import served, tiny_app
from tests.tiny import tiny_model, tiny_tokenizer

PAIRS = [
    ("the cat sat on the mat\nLabel:", " positive"),
    ("the cat\nLabel:", " negative"),
    ("naïve “café” 日本\nLabel:", " positive"),
    ("naïve ", "日本 negative"),
    ("Question: the mat? Answer", ": on the mat"),
]
ASKED = [[Turn("user", "the cat sat")]]
SHORT = Writing(max_tokens=4)


@pytest.fixture(autouse=True)
def no_waiting(monkeypatch):
    monkeypatch.setattr(module, "FIRST_WAIT", 0.001)


@pytest.fixture(scope="module")
def url():
    with served(tiny_app()) as found:
        yield found


def in_this_process():
    return in_process(tiny_model(), tiny_tokenizer(chat=True), causal_loss())


def test_scores_through_the_endpoint_are_those_in_process(url):
    endpoint = Endpoint(Address(url, "tiny", batch=2))
    assert "log-probabilities" in endpoint.check()
    there, here = endpoint.score(PAIRS), in_this_process().score(PAIRS)
    for one, other in zip(there, here, strict=True):
        assert one.total == pytest.approx(other.total, abs=1e-4)
        assert (one.tokens, one.characters) == (other.tokens, other.characters)


def test_an_answer_through_the_endpoint_is_that_in_process(url):
    conversations = [[Turn("user", "the cat sat")], [Turn("system", "on the mat"), Turn("user", "cat")]]
    here = in_this_process().write(conversations, Writing(max_tokens=6))
    there = Endpoint(Address(url, "tiny")).write(conversations, Writing(max_tokens=6))
    assert [text.rstrip("\ufffd") for text in there] == [text.rstrip("\ufffd") for text in here]


def test_what_is_spent_is_counted_and_outlives_the_process(url, tmp_path):
    endpoint = Endpoint(Address(url, "tiny"), Budget(price_written=1e6))
    endpoint.purse.keep(tmp_path / "spent.json")
    endpoint.write(ASKED, SHORT)
    assert endpoint.purse.used == Used(1, 19, 4, 4.0)
    again = Endpoint(Address(url, "tiny"), Budget(calls=1))
    again.purse.keep(tmp_path / "spent.json")
    with pytest.raises(Unanswered, match="budget of 1 calls"):
        again.write(ASKED, SHORT)
    assert again.purse.used.calls == 1


def test_a_budget_is_never_exceeded_also_by_what_is_under_way():
    purse = Purse(Budget(tokens=100))
    first = purse.reserve(30, 30)
    with pytest.raises(Spent):
        purse.reserve(30, 30)
    purse.settle(first, 10, 5)
    assert (purse.used.read, purse.used.written) == (10, 5)
    purse.settle(purse.reserve(30, 30))
    assert (purse.used.calls, purse.used.read) == (2, 40)


def test_a_ledger_that_says_nothing_is_no_licence_to_spend(tmp_path):
    (tmp_path / "spent.json").write_text("[]")
    with pytest.raises(FedllmError, match="does not say"):
        Purse(Budget()).keep(tmp_path / "spent.json")


def test_nobody_there_and_no_such_model_are_said_before_anything_is_done(url):
    with pytest.raises(FedllmError, match="Connection error"):
        Endpoint(Address("http://127.0.0.1:9/v1", "tiny", tries=2)).check()
    with pytest.raises(FedllmError, match="has no model 'other'; it has tiny"):
        Endpoint(Address(url, "other")).check()


def test_a_key_comes_from_the_environment_alone(monkeypatch):
    with pytest.raises(FedllmError, match="export NO_SUCH_KEY"):
        Endpoint(Address("http://127.0.0.1:9/v1", "tiny", key_env="NO_SUCH_KEY"))
    with served(tiny_app(key="geheim")) as url:
        monkeypatch.setenv("OUR_KEY", "geheim")
        assert Endpoint(Address(url, "tiny", key_env="OUR_KEY")).check()
        monkeypatch.setenv("OUR_KEY", "falsch")
        with pytest.raises(FedllmError, match="key is missing or wrong"):
            Endpoint(Address(url, "tiny", key_env="OUR_KEY")).check()


def good(text="yes"):
    usage = {"prompt_tokens": 3, "completion_tokens": 1, "total_tokens": 4}
    return JSONResponse({"choices": [{"index": 0, "message": {"role": "assistant", "content": text}}], "usage": usage})


def scripted(answers):
    """An endpoint that gives these answers one after the other, and then good ones; and when it was asked."""
    asked = []

    async def chat(request):
        asked.append((time.monotonic(), json.loads(await request.body())))
        return answers[len(asked) - 1]() if len(asked) <= len(answers) else good()

    return Starlette(routes=[Route("/v1/chat/completions", chat, methods=["POST"])]), asked


def busy(wait):
    return lambda: JSONResponse({"error": {"message": "busy"}}, 429, {"Retry-After": str(wait)})


RUBBISH = [
    lambda: Response("<html>", media_type="text/html"),
    lambda: JSONResponse({"choices": []}),
    lambda: JSONResponse({"choices": [{"message": {"content": 7}}]}),
    lambda: JSONResponse([1]),
]


def test_what_is_down_or_answers_rubbish_is_asked_again():
    app, asked = scripted([lambda: Response("", 503), *RUBBISH])
    with served(app) as url:
        endpoint = Endpoint(Address(url, "m", tries=6))
        assert endpoint.write(ASKED, SHORT) == ["yes"]
    assert len(asked) == 6
    assert endpoint.purse.used.calls == 6
    assert asked[0][1]["seed"] == asked[5][1]["seed"]


def test_a_busy_endpoint_is_left_alone_for_as_long_as_it_asks():
    app, asked = scripted([busy(0.3)])
    with served(app) as url:
        Endpoint(Address(url, "m")).write(ASKED, SHORT)
    assert asked[1][0] - asked[0][0] >= 0.3


def test_what_stays_wrong_ends_in_one_sentence():
    for answer, says in ((RUBBISH[0], "rubbish"), (busy(0), "busy")):
        app, asked = scripted([answer] * 9)
        with served(app) as url, pytest.raises(Unanswered, match=says):
            Endpoint(Address(url, "m", tries=3)).write(ASKED, SHORT)
        assert len(asked) == 3


def test_a_request_that_is_wrong_is_not_repeated():
    app, asked = scripted([lambda: JSONResponse({"error": {"message": "too long"}}, 400)] * 3)
    with served(app) as url, pytest.raises(Unanswered, match=r"400.*too long"):
        Endpoint(Address(url, "m")).write(ASKED, SHORT)
    assert len(asked) == 1


def test_a_slow_endpoint_is_given_up_and_counted_as_paid():
    async def slow(request):
        await anyio.sleep(5)

    import anyio

    with served(Starlette(routes=[Route("/v1/chat/completions", slow, methods=["POST"])])) as url:
        endpoint = Endpoint(Address(url, "m", timeout=0.2, tries=2))
        with pytest.raises(Unanswered, match="timed out"):
            endpoint.write(ASKED, SHORT)
    assert endpoint.purse.used == Used(2, 2 * 27, 2 * 4, 0.0)


def test_an_endpoint_for_chats_alone_can_only_write():
    app, _ = scripted([])

    async def models(request):
        return JSONResponse({"object": "list", "data": [{"id": "m", "object": "model"}]})

    app.router.routes.append(Route("/v1/models", models))
    with served(app) as url:
        endpoint = Endpoint(Address(url, "m", tries=2))
        assert "matched exactly" in endpoint.check()
        assert endpoint.speaker().score is None
        with pytest.raises(FedllmError, match="does not tell"):
            endpoint.score(PAIRS)


class Choice:
    """A completion's choice, as other servers make them."""

    def __init__(self, text, tokens, logprobs, starts):
        self.text, self.logprobs = text, self
        self.tokens, self.token_logprobs, self.text_offset = tokens, logprobs, starts


def test_a_token_across_the_seam_is_scored_and_one_written_after_the_prompt_is_not():
    choice = Choice("a bc d", ["a", " b", "c ", "d"], [None, -1.0, -2.0, -4.0], [0, 1, 3, 5])
    assert scored(choice, "a b", "c ")[:2] == (-2.0, 1)
    assert scored(choice, "a", " bc ")[:2] == (-3.0, 2)
    assert scored(choice, "a ", "bc ")[:2] == (-3.0, 2)


def test_a_special_token_before_the_text_moves_nothing():
    assert ends(["<s>", "ab", " c"], [0, 3, 5], "ab c") == [0, 2, 4]


@pytest.mark.parametrize(
    ("choice", "says"),
    [
        (Choice("xy", ["a", " b"], [None, -1.0], [0, 1]), "not echoed"),
        (Choice("a b", ["a", " b"], [None], [0, 1]), "different lengths"),
        (Choice("a b", ["a", " b"], [None, 0.5], [0, 1]), "0.5 as a log-probability"),
        (Choice("a b", ["a", " b"], [None, float("nan")], [0, 1]), "nan"),
        (Choice("a b", ["a", " b"], [None, None], [0, 1]), "None as"),
        (Choice("a b", ["?", "?"], [None, -1.0], [2, 1]), "do not rise"),
    ],
)
def test_log_probabilities_that_cannot_be_are_rubbish(choice, says):
    with pytest.raises(module.Rubbish, match=says):
        scored(choice, "a", " b")
