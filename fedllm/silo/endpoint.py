"""A model behind an OpenAI-compatible API: text in, text or log-probabilities out.

What is down, slow, rate-limited or answers rubbish is asked again, later each time; after that `Unanswered` is raised
and the silo sits the round out. Prompts are scored by completions with `echo` and `logprobs`, as vLLM, llama-cpp-python
and `fedllm serve` have them; an endpoint without them can only write.
"""

from __future__ import annotations

import math
import os
import random
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import Any, NamedTuple, TypeVar

from fedllm.core.errors import FedllmError
from fedllm.core.seeds import derive
from fedllm.silo.purse import Budget, Purse, Spent
from fedllm.silo.scoring import Scored
from fedllm.silo.speaker import Speaker, Writing
from fedllm.silo.templates import Turn

FIRST_WAIT, LONGEST_WAIT = 0.5, 60.0
"""Seconds between two tries: the first, twice as long each time; and the most, whatever the endpoint asks for."""

HIGHEST = 1e-3
"""A log-probability above 0 by more than rounding is none."""

Value = TypeVar("Value")


class Unanswered(Exception):
    """The model gave no answer that can be used; the silo sits this round out."""


class Rubbish(Exception):
    """An answer that is not what was asked for."""


class Address(NamedTuple):
    """Where the model is, and how patient to be with it."""

    url: str
    model: str
    key_env: str | None = None
    """The environment variable that holds the key."""
    timeout: float = 60.0
    """Seconds without a byte after which a request is given up."""
    tries: int = 5
    parallel: int = 4
    """Requests at the same time."""
    batch: int = 16
    """Prompts that are scored in one request."""


class Way(NamedTuple):
    """How an endpoint scores: how many tokens it must write after the prompt, and how many prompts it takes."""

    written: int
    batch: int


class Endpoint:
    """A model behind an API; threads may share it. Closing it lets go of the connections."""

    def __init__(self, address: Address, budget: Budget | None = None) -> None:
        """Make ready to ask; nothing is sent yet.

        Raises:
            FedllmError: if the key's variable is not set, or the package is missing.
        """
        try:
            import openai
        except ModuleNotFoundError as error:
            raise FedllmError(
                "A model behind an API needs the package openai; run: pip install 'fedllm[prompts]'"
            ) from error
        key = os.environ.get(address.key_env) if address.key_env else "none"
        if not key:
            raise FedllmError(
                f"endpoint.key_env is '{address.key_env}', but there is no such environment variable; "
                f"set it to the key: export {address.key_env}=..."
            )
        self._client = openai.OpenAI(base_url=address.url, api_key=key, timeout=address.timeout, max_retries=0)
        self.address, self.purse = address, Purse(budget or Budget())
        self._way: Way | None = None

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def check(self) -> str:
        """Ask a first time, to see what the endpoint can do; return it as a sentence.

        Raises:
            FedllmError: if it does not answer, or does not have the model.
        """
        import openai

        try:
            listed: list[Any] = self._call(lambda: self._client.models.list().data, 0, 0)
            known = [str(each.id) for each in listed]
            if known and self.address.model not in known:
                raise FedllmError(
                    f"{self.address.url} has no model '{self.address.model}'; it has {', '.join(known[:5])}."
                )
            self._way = self._scores()
        except Unanswered as problem:
            raise FedllmError(
                f"The endpoint {self.address.url} cannot be used: {problem}; start it, or mend endpoint.url."
            ) from problem
        except openai.OpenAIError as error:
            raise FedllmError(
                f"The endpoint {self.address.url} cannot be used: {plain(error)}; start it, or mend endpoint.url."
            ) from error
        how = (
            "tells the log-probabilities of prompts"
            if self._way
            else "does not tell log-probabilities of prompts: answers are matched exactly instead"
        )
        return f"{self.address.model} at {self.address.url} {how}"

    def _unusable(self, problem: Exception) -> str:
        return f"The endpoint {self.address.url} cannot be used: {plain(problem)}; start it, or mend [endpoint]."

    def speaker(self) -> Speaker:
        """Return the model as prompt methods see it."""
        return Speaker(self.write, self.score if self._way else None, lambda: self.purse.used)

    def write(self, conversations: Sequence[Sequence[Turn]], writing: Writing) -> list[str]:
        """Return what the assistant says next in each conversation, or raise `Unanswered`."""

        def one(place: int) -> str:
            turns = [turn._asdict() for turn in conversations[place]]
            extra: dict[str, Any] = {"stop": list(writing.stop)} if writing.stop else {}
            read = sum(len(turn["content"].encode()) + 16 for turn in turns)

            def ask() -> Any:
                return self._client.chat.completions.create(
                    model=self.address.model,
                    messages=turns,  # type: ignore[arg-type]
                    max_tokens=writing.max_tokens,
                    temperature=writing.temperature,
                    top_p=writing.top_p,
                    seed=derive(writing.seed, "write", place) % 2**31,
                    **extra,
                )

            return self._call(ask, read, writing.max_tokens, lambda answer: written(answer).strip())

        return self._each(one, range(len(conversations)))

    def score(self, pairs: Sequence[tuple[str, str]]) -> list[Scored]:
        """Return the log-probability of each (before, after)'s `after`, or raise `Unanswered`."""
        if self._way is None:
            raise FedllmError(f"{self.address.url} does not tell log-probabilities of prompts; use one that does.")
        if empty := next((after for before, after in pairs if not before), None):
            raise FedllmError(f"'{empty}' cannot be scored with nothing before it; give the template some text.")
        way = self._way
        groups = [pairs[first : first + way.batch] for first in range(0, len(pairs), way.batch)]
        return [each for group in self._each(lambda group: self._score(group, way), groups) for each in group]

    def _score(self, pairs: Sequence[tuple[str, str]], way: Way) -> list[Scored]:
        texts = [before + after for before, after in pairs]

        def ask() -> Any:
            return self._client.completions.create(
                model=self.address.model,
                prompt=texts if way.batch > 1 else texts[0],
                echo=True,
                logprobs=1,
                max_tokens=way.written,
                temperature=0.0,
            )

        def take(answer: Any) -> list[Scored]:
            choices = answer.choices
            if not isinstance(choices, list) or len(choices) != len(pairs):
                raise Rubbish("not one choice for each prompt")
            placed = sorted(choices, key=lambda choice: choice.index)
            return [scored(choice, *pair) for choice, pair in zip(placed, pairs, strict=True)]

        read = sum(len(text.encode()) + 2 for text in texts)
        return self._call(ask, read, way.written * len(texts), take)

    def _scores(self) -> Way | None:
        """Find out how the endpoint scores prompts, if it does."""
        import openai

        pairs = [("The sky is", " blue"), ("One and one is", " two")]
        for way in (Way(0, self.address.batch), Way(1, self.address.batch), Way(1, 1)):
            try:
                self._score(pairs if way.batch > 1 else pairs[:1], way)
                return way
            except (Unanswered, openai.APIStatusError) as problem:
                cause = problem.__cause__ if isinstance(problem, Unanswered) else problem
                if not isinstance(cause, (Rubbish, openai.BadRequestError, openai.NotFoundError)) and not (
                    isinstance(cause, openai.APIStatusError) and cause.status_code in (405, 422, 500, 501)
                ):
                    raise
        return None

    def _each(self, do: Callable[[Any], Value], items: Sequence[Any]) -> list[Value]:
        """Do something with each of the items, several at the same time; the first problem ends it."""
        if len(items) < 2 or self.address.parallel == 1:
            return [do(item) for item in items]
        with ThreadPoolExecutor(min(self.address.parallel, len(items))) as pool:
            futures = [pool.submit(do, item) for item in items]
            try:
                return [future.result() for future in futures]
            finally:
                for future in futures:
                    future.cancel()

    def _call(
        self, ask: Callable[[], Any], read: int, most: int, take: Callable[[Any], Value] = lambda answer: answer
    ) -> Value:
        """Ask until there is an answer that can be taken; `read` and `most` are tokens that it can cost at most."""
        import openai

        waits = delays()
        last: Exception = Rubbish("no answer")
        for number in range(self.address.tries):
            if number:
                time.sleep(max(next(waits), asked_to_wait(last)))
            try:
                reserved = self.purse.reserve(read, most)
            except Spent as problem:
                raise Unanswered(str(problem)) from problem
            cost: tuple[int, int] | None = (0, 0)
            try:
                answer = ask()
                cost = used(answer)
                return take(answer)
            except openai.APIStatusError as error:
                if error.status_code not in (408, 409, 425, 429) and error.status_code < 500:
                    raise Unanswered(plain(error)) from error
                last = error
            except openai.APITimeoutError as error:
                # It may have been worked on, and paid for.
                last, cost = error, None
            except (openai.OpenAIError, Rubbish, AttributeError, TypeError, ValueError, KeyError, IndexError) as error:
                last = error if isinstance(error, openai.OpenAIError) else Rubbish(str(error)[:200])
            finally:
                self.purse.settle(reserved, *(cost or ()))
        raise Unanswered(f"{plain(last)} ({self.address.tries} tries)") from last


def delays() -> Iterator[float]:
    """Yield the seconds to wait before each next try, with some chance in them, so that silos do not come together."""
    wait = FIRST_WAIT
    while True:
        yield wait * random.uniform(0.75, 1.25)
        wait = min(2 * wait, LONGEST_WAIT)


def asked_to_wait(error: Exception) -> float:
    """Return the seconds that an endpoint asks to be left alone, within reason."""
    headers = getattr(getattr(error, "response", None), "headers", {})
    try:
        wait = float(headers.get("retry-after", 0))
    except ValueError:
        return 0.0
    return min(max(wait, 0.0), LONGEST_WAIT) if math.isfinite(wait) else 0.0


def plain(error: Exception) -> str:
    """Return a problem as words without a full stop; never the key, which no error of the client holds."""
    status = getattr(error, "status_code", None)
    said = str(getattr(error, "message", error) or type(error).__name__).split("\n")[0][:200].rstrip(". ")
    kind = "its answer is rubbish: " if isinstance(error, Rubbish) else ""
    return f"{kind}{said}" if status is None or str(status) in said else f"it answers {status}: {said}"


def used(answer: Any) -> tuple[int, int] | None:
    """Return the tokens that an answer says it read and wrote, or None where it does not say."""
    usage = getattr(answer, "usage", None)
    read, wrote = getattr(usage, "prompt_tokens", None), getattr(usage, "completion_tokens", 0) or 0
    if isinstance(answer, list):
        return 0, 0
    return (read, wrote) if isinstance(read, int) and isinstance(wrote, int) and read >= 0 <= wrote else None


def written(answer: Any) -> str:
    """Return the text of a chat's answer, or raise `Rubbish`."""
    text = answer.choices[0].message.content
    if not isinstance(text, str):
        raise Rubbish("a message without text")
    return text


def scored(choice: Any, before: str, after: str) -> Scored:
    """Return the score of `after` from an echoed prompt's log-probabilities, or raise `Rubbish`.

    As in `silo.tasks.tokenise` a token belongs to `after` if it ends there, also one across the seam.
    """
    text, told = before + after, choice.logprobs
    tokens, logprobs, starts = told.tokens, told.token_logprobs, told.text_offset
    if not isinstance(choice.text, str) or not choice.text.startswith(text):
        raise Rubbish("a prompt that is not echoed")
    if not (len(tokens) == len(logprobs) == len(starts)):
        raise Rubbish("lists of different lengths")
    total, count = 0.0, 0
    for end, logprob in zip(ends(tokens, starts, choice.text), logprobs, strict=True):
        if len(before) < end <= len(text):
            if isinstance(logprob, bool) or not isinstance(logprob, (int, float)) or not -math.inf < logprob < HIGHEST:
                raise Rubbish(f"{logprob!r} as a log-probability")
            total, count = total + logprob, count + 1
    if not count:
        raise Rubbish("no token of what was to be scored")
    return Scored(total, count, len(after.removeprefix(" ")))


def ends(tokens: Sequence[Any], starts: Sequence[Any], text: str) -> list[int]:
    """Return where each token ends in a text: by the tokens themselves where they spell it, else by their offsets.

    Some servers count a special token before the text, which is none of it.

    >>> ends(["<s>", "The", " sky"], [0, 3, 6], "The sky"), ends(["\\ufffd", "\\ufffd"], [0, 1], "é")
    ([0, 3, 7], [1, 1])
    """
    for first in (0, 1):
        if "".join(map(str, tokens[first:])) == text:
            places = [0] * (first + 1)
            for token in tokens[first:]:
                places.append(places[-1] + len(token))
            return places[1:]
    if any(not isinstance(start, int) for start in starts) or any(b < a for a, b in pairwise(starts)):
        raise Rubbish("offsets that do not rise")
    return [min(end, len(text)) for end in (*starts[1:], len(text))]
