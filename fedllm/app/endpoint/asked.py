"""What may be asked of the endpoint: OpenAI's fields as far as they are done; what is not done is refused by name."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from fedllm.silo.templates import Turn

PASSED_OVER = {"user", "metadata", "store", "service_tier", "safety_identifier", "prompt_cache_key"}
"""Fields that change nothing in the answer."""

NEUTRAL: Mapping[str, Any] = {
    "frequency_penalty": 0,
    "presence_penalty": 0,
    "logit_bias": {},
    "best_of": 1,
    "tools": [],
    "tool_choice": "none",
    "functions": [],
    "response_format": {"type": "text"},
    "modalities": ["text"],
}
"""Fields that are not done, and the value that asks for nothing."""

Stop = Annotated[str, Field(min_length=1, max_length=200)]


class Bad(Exception):
    """A request that is answered with an error, in OpenAI's shape."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code


class Closed(BaseModel):
    """An object whose keys are all known."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class StreamOptions(Closed):
    """How an answer is streamed."""

    include_usage: bool = False


class Asked(Closed):
    """What both kinds of request have."""

    model: str
    temperature: float = Field(1.0, ge=0, le=2)
    top_p: float = Field(1.0, gt=0, le=1)
    n: int = Field(1, ge=1, le=16)
    seed: int | None = Field(None, ge=-(2**63), lt=2**63)
    stop: tuple[Stop, ...] = Field((), max_length=16)
    stream: bool = False
    stream_options: StreamOptions = StreamOptions()

    @model_validator(mode="before")
    @classmethod
    def _without_what_says_nothing(cls, asked: Any) -> Any:
        if not isinstance(asked, dict):
            return asked
        return {
            key: value
            for key, value in asked.items()
            if key not in PASSED_OVER and value is not None and (key not in NEUTRAL or value != NEUTRAL[key])
        }

    @field_validator("stop", mode="before")
    @classmethod
    def _one_stop(cls, stop: Any) -> Any:
        return (stop,) if isinstance(stop, str) else stop


class Part(Closed):
    """A part of a message; only text is read."""

    type: str = Field(pattern="^text$")
    text: str


class Message(Closed):
    """One message of a conversation."""

    role: str = Field(pattern="^(system|developer|user|assistant)$")
    content: str | list[Part]
    name: str | None = None

    def turn(self) -> Turn:
        """Return it as the templates take it."""
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Turn("system" if self.role == "developer" else self.role, text)


class Chat(Asked):
    """A request to `/v1/chat/completions`."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = Field(None, ge=1)
    max_completion_tokens: int | None = Field(None, ge=1)
    logprobs: bool = False
    top_logprobs: int = Field(0, ge=0, le=20)


class Completion(Asked):
    """A request to `/v1/completions`; with `echo`, `logprobs` and `max_tokens` 0 it scores its prompts."""

    prompt: Annotated[list[str], Field(min_length=1, max_length=256)]
    max_tokens: int = Field(16, ge=0)
    logprobs: int | None = Field(None, ge=0, le=20)
    echo: bool = False

    @field_validator("prompt", mode="before")
    @classmethod
    def _one_prompt(cls, prompt: Any) -> Any:
        return [prompt] if isinstance(prompt, str) else prompt


Kind = TypeVar("Kind", Chat, Completion)


def read(kind: type[Kind], body: bytes) -> Kind:
    """Return a request from its body.

    Raises:
        Bad: for what is not JSON, or has a field that is wrong or not done; its name is `param`.
    """
    try:
        return kind.model_validate(json.loads(body))
    except (ValueError, RecursionError) as error:
        if not isinstance(error, ValidationError):
            raise Bad(400, "The body is not JSON.") from error
        problem = error.errors(include_input=False, include_url=False)[0]
        path = ".".join(str(key) for key in problem["loc"])
        said = "is not something that this server does" if problem["type"] == "extra_forbidden" else problem["msg"]
        if problem["type"] == "missing":
            said = "is missing"
        raise Bad(400, f"{path or 'The body'}: {said[0].lower()}{said[1:]}.", path or None) from error
