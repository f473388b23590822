"""The endpoint: OpenAI's client gets what the model says in process; whatever is wrong is an error in its shape."""

from __future__ import annotations

import json
import threading
import urllib.error
import urllib.request

import openai
import pytest
import torch

from fedllm.app.endpoint import server as module
from fedllm.app.endpoint.server import application
from fedllm.app.endpoint.speech import up_to_stop
from fedllm.app.serve import bound, is_local
from fedllm.core.errors import FedllmError
from fedllm.evaluation.generate import complete
from fedllm.evaluation.tokens import read_tokens
from fedllm.silo.templates import Turn
from tests.endpoints import served, tiny_app, tiny_voice
from tests.tiny import tiny_model, tiny_tokenizer

HELLO = [{"role": "user", "content": "the cat sat"}]


@pytest.fixture(scope="module")
def url():
    with served(tiny_app()) as found:
        yield found


@pytest.fixture(scope="module")
def client(url):
    return openai.OpenAI(base_url=url, api_key="none", max_retries=0)


def chat(client, **settings):
    return client.chat.completions.create(model="tiny", messages=HELLO, **{"temperature": 0, **settings})


def test_it_says_what_it_serves(client):
    assert [(each.id, each.max_model_len) for each in client.models.list()] == [("tiny", 512)]


def test_an_answer_is_the_models_own_and_its_tokens_are_counted(client):
    (here,) = complete(tiny_model(), tiny_tokenizer(chat=True), [[Turn(**HELLO[0])]], max_new_tokens=6)
    answer = chat(client, max_tokens=6)
    assert answer.choices[0].message.content.strip().rstrip("\ufffd") == here.rstrip("\ufffd")
    assert answer.choices[0].finish_reason == "length"
    assert answer.usage.completion_tokens == 6
    assert answer.usage.total_tokens == answer.usage.prompt_tokens + 6


def test_a_stream_is_the_same_text_in_pieces_and_says_what_it_took(client):
    whole = chat(client, max_tokens=8, logprobs=True, top_logprobs=2)
    options = {"stream": True, "stream_options": {"include_usage": True}}
    chunks = list(chat(client, max_tokens=8, logprobs=True, top_logprobs=2, **options))
    pieces = [chunk.choices[0] for chunk in chunks if chunk.choices]
    assert len(pieces) > 3
    assert "".join(piece.delta.content for piece in pieces) == whole.choices[0].message.content
    assert [piece.finish_reason for piece in pieces if piece.finish_reason] == ["length"]
    assert chunks[-1].usage == whole.usage
    told = [each for piece in pieces if piece.logprobs for each in piece.logprobs.content]
    assert told == whole.choices[0].logprobs.content
    assert len(told) == 8


def test_an_answer_ends_before_a_stop(client):
    whole = chat(client, max_tokens=8).choices[0].message.content
    stop = whole[3:5]
    ended = chat(client, max_tokens=8, stop=[stop, "never said"], logprobs=True).choices[0]
    assert ended.message.content == whole[: whole.index(stop)]
    assert ended.finish_reason == "stop"
    assert "".join(each.token for each in ended.logprobs.content).startswith(ended.message.content)


def test_log_probabilities_of_a_prompt_are_the_models(client):
    text = "the cat sat on the mat"
    told = client.completions.create(model="tiny", prompt=text, max_tokens=0, echo=True, logprobs=3).choices[0]
    ids = tiny_tokenizer()(text)["input_ids"]
    logprobs_TV = tiny_model()(torch.tensor([ids])).logits[0, :-1].log_softmax(-1)
    assert told.text == "".join(told.logprobs.tokens) == text
    assert told.logprobs.token_logprobs[0] is None
    expected = [logprobs_TV[place, token].item() for place, token in enumerate(ids[1:])]
    assert told.logprobs.token_logprobs[1:] == pytest.approx(expected, abs=1e-5)
    assert max(told.logprobs.top_logprobs[1].values()) == pytest.approx(logprobs_TV[0].max().item(), abs=1e-5)
    assert [text[start] for start in told.logprobs.text_offset] == [token[0] for token in told.logprobs.tokens]


def test_a_batch_of_prompts_of_any_length_scores_as_one_by_one(monkeypatch):
    rows = [[5, 6, 7, 8, 9], [10, 11], [12], [13, 14, 15]]
    together = read_tokens(tiny_model(), rows, 1, 307)
    for row, told in zip(rows, together, strict=True):
        (alone,) = read_tokens(tiny_model(), [row], 1, 307)
        assert [each.token for each in told] == row
        assert [each.logprob for each in told][1:] == pytest.approx([each.logprob for each in alone][1:], abs=1e-5)


def test_what_is_written_after_an_echoed_prompt_is_scored_too(client):
    settings = {"model": "tiny", "prompt": "the cat", "temperature": 0}
    told = client.completions.create(**settings, max_tokens=3, echo=True, logprobs=1).choices[0]
    again = client.completions.create(**settings, max_tokens=3).choices[0].text
    assert told.text == "the cat" + again
    assert len(told.logprobs.tokens) == 2 + 3


def test_a_seed_repeats_an_answer_and_choices_differ(client):
    first, second = (chat(client, temperature=2, seed=5, n=2, max_tokens=12) for _ in range(2))
    texts = [choice.message.content for choice in first.choices]
    assert texts == [choice.message.content for choice in second.choices]
    assert texts[0] != texts[1]
    greedy = chat(client, temperature=1, top_p=1e-6, seed=1, max_tokens=6).choices[0].message.content
    assert greedy == chat(client, max_tokens=6).choices[0].message.content


def test_a_model_without_a_chat_template_ends_where_it_would_ask_itself():
    with served(tiny_app(chat=False)) as url:
        answer = chat(openai.OpenAI(base_url=url, api_key="none"), max_tokens=4)
    (here,) = complete(tiny_model(), tiny_tokenizer(), [[Turn(**HELLO[0])]], max_new_tokens=4)
    assert answer.choices[0].message.content.strip().rstrip("\ufffd") == here.rstrip("\ufffd")


@pytest.mark.parametrize(
    ("settings", "param", "says"),
    [
        ({"max_tokens": 5000}, "messages", "512 tokens in all"),
        ({"temperature": 3}, "temperature", "less than or equal to 2"),
        ({"frequency_penalty": 1}, "frequency_penalty", "not something that this server does"),
        ({"tools": [{"type": "function"}]}, "tools", "not something"),
        ({"stop": [""]}, "stop.0", "at least 1"),
        ({"n": 100}, "n", "16"),
    ],
)
def test_what_is_not_done_is_refused_by_name(client, settings, param, says):
    with pytest.raises(openai.BadRequestError, match=says) as problem:
        chat(client, **settings)
    assert problem.value.param == param
    assert problem.value.body["type"] == "invalid_request_error"


def test_fields_that_ask_for_nothing_are_passed_over(client):
    assert chat(client, max_tokens=1, frequency_penalty=0, user="me", logit_bias={}, tool_choice="none")


def test_another_models_name_is_not_found(client):
    with pytest.raises(openai.NotFoundError, match="no model 'gpt-4' here; this one is 'tiny'"):
        client.chat.completions.create(model="gpt-4", messages=HELLO)


def post(url, body, **headers):
    headers = {"Content-Type": "application/json", **headers}
    asked = urllib.request.Request(f"{url}/completions", body, headers)
    try:
        with urllib.request.urlopen(asked, timeout=60) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as problem:
        data = problem.read()
        return problem.code, json.loads(data) if data.startswith(b"{") else data


@pytest.mark.parametrize(
    ("body", "status"),
    [
        (b"", 400),
        (b"{", 400),
        (b"[]", 400),
        (b"[" * 100_000, 400),
        (b'{"model": "tiny"}', 400),
        (b'{"model": "tiny", "prompt": []}', 400),
        (b'{"model": "tiny", "prompt": [1, 2]}', 400),
        (b'{"model": "tiny", "prompt": "\xff"}', 400),
        (b'{"model": "tiny", "prompt": "a", "max_tokens": 1e400}', 400),
        (b" " * (module.LARGEST + 1), 413),
    ],
)
def test_rubbish_is_an_error_in_openais_shape(url, body, status):
    code, answer = post(url, body)
    assert code == status
    assert answer["error"]["message"]


def test_a_web_page_cannot_use_it(url):
    assert post(url, b"{}", **{"Content-Type": "text/plain"})[0] == 415
    assert post(url, b"{}", Host="evil.example")[0] == 400


def test_a_key_is_asked_for_where_there_is_one():
    with served(tiny_app(key="s3cret")) as url:
        for key in ("wrong", "s3cre"):
            with pytest.raises(openai.AuthenticationError):
                openai.OpenAI(base_url=url, api_key=key, max_retries=0).models.list()
        assert list(openai.OpenAI(base_url=url, api_key="s3cret").models.list())


def test_one_at_a_time_so_many_wait_and_the_rest_are_told_to_come_back():
    begun, go_on = threading.Event(), threading.Event()
    voice = tiny_voice()
    held = voice.model.forward

    def slow(*args, **kwargs):
        begun.set()
        assert go_on.wait(60)
        return held(*args, **kwargs)

    voice.model.forward = slow
    answers = []
    body = json.dumps({"model": "tiny", "prompt": "the", "max_tokens": 1}).encode()
    with served(application(voice, queue=1)) as url:
        first = threading.Thread(target=lambda: answers.append(post(url, body)[0]))
        first.start()
        assert begun.wait(60)
        second = threading.Thread(target=lambda: answers.append(post(url, body)[0]))
        second.start()
        codes = []
        while 429 not in codes:
            # Until the second waits a third may take its place, and would then wait itself.
            third = threading.Thread(target=lambda: codes.append(post(url, body)[0]))
            third.start()
            third.join(0.5)
        go_on.set()
        first.join()
        second.join()
    assert 200 in answers


def test_a_client_that_goes_stops_the_model(monkeypatch):
    voice, steps = tiny_voice(context=2000), []
    held = voice.model.forward

    def counted(*args, **kwargs):
        steps.append(1)
        return held(*args, **kwargs)

    voice.model.forward = counted
    with served(application(voice)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        with client.completions.create(model="tiny", prompt="the", max_tokens=1500, stream=True) as stream:
            next(iter(stream))
        assert client.completions.create(model="tiny", prompt="the", max_tokens=1).usage.completion_tokens == 1
    assert len(steps) < 1500


def test_a_model_that_fails_is_an_error_and_the_next_request_is_answered():
    voice = tiny_voice()
    held = voice.model.forward

    def broken(*args, **kwargs):
        raise RuntimeError("out of memory")

    with served(application(voice)) as url:
        client = openai.OpenAI(base_url=url, api_key="none", max_retries=0)
        voice.model.forward = broken
        with pytest.raises(openai.InternalServerError, match="the server's log"):
            chat(client, max_tokens=2)
        with pytest.raises(openai.APIError, match="the server's log"):
            list(chat(client, max_tokens=2, stream=True))
        voice.model.forward = held
        assert chat(client, max_tokens=2)


def test_a_stop_that_may_have_begun_waits():
    assert up_to_stop("ab", ["bc"]) == (1, False)
    assert up_to_stop("abd", ["bc"]) == (3, False)
    assert up_to_stop("xbc", ["bc", "xb"]) == (0, True)


def test_a_port_that_is_taken_is_said():
    with bound("127.0.0.1", 0) as taken, pytest.raises(FedllmError, match="--port"):
        bound("127.0.0.1", taken.getsockname()[1])
    assert is_local("127.0.0.1")
    assert is_local("localhost")
    assert not is_local("0.0.0.0")
