"""The server: one model, one request at a time, a short queue, limits on what is sent. It runs nothing it is told.

A request that finds the queue full is answered with 429; one whose client has gone is given up.
"""

from __future__ import annotations

import hmac
import json
import logging
from collections.abc import Awaitable, Callable, Iterator
from functools import partial
from typing import Any

import anyio
from starlette.applications import Starlette
from starlette.concurrency import iterate_in_threadpool, run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route
from starlette.types import ASGIApp, Receive, Scope, Send

from fedllm.app.endpoint import answers
from fedllm.app.endpoint.asked import Bad, Chat, Completion, read
from fedllm.app.endpoint.speech import Saying, Voice, prepared, said

LARGEST = 1 << 20
"""Bytes of a request."""

PATIENCE = 30.0
"""Seconds that a client may take to send its request, or to take a chunk of the answer."""

LOCAL = ["127.0.0.1", "localhost", "[::1]"]

log = logging.getLogger("fedllm.serve")


def application(voice: Voice, key: str | None = None, queue: int = 16, local: bool = True) -> Starlette:
    """Return the ASGI application that serves a model.

    With a `key` every request must bring it as bearer token. At most `queue` requests wait. A `local` one answers only
    to the names of this machine, so that no web page can reach it under a name of its own.
    """
    turn = Turn(queue)

    async def models(request: Request) -> Response:
        about = {"id": voice.name, "object": "model", "created": 0, "owned_by": "fedllm"}
        return JSONResponse({"object": "list", "data": [{**about, "max_model_len": voice.context}]})

    async def speak(request: Request, kind: Any) -> ASGIApp:
        asked = read(kind, await body_of(request))
        if asked.model != voice.name:
            message = f"There is no model '{asked.model[:200]}' here; this one is '{voice.name}'."
            raise Bad(404, message, "model", "model_not_found")
        return answering(voice, asked, await run_in_threadpool(prepared, voice, asked), turn)

    async def bad(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, Bad)
        return failed(problem)

    async def not_there(request: Request, problem: Exception) -> Response:
        assert isinstance(problem, HTTPException)
        known = "GET /v1/models, POST /v1/chat/completions and POST /v1/completions"
        return failed(Bad(problem.status_code, f"{problem.detail}: this server has {known}."))

    return Starlette(
        routes=[
            Route("/v1/models", models, methods=["GET"]),
            Route("/v1/chat/completions", partial(speak, kind=Chat), methods=["POST"]),
            Route("/v1/completions", partial(speak, kind=Completion), methods=["POST"]),
        ],
        middleware=[
            *([Middleware(TrustedHostMiddleware, allowed_hosts=LOCAL)] if local else []),
            *([Middleware(behind_key, key=key)] if key else []),
        ],
        exception_handlers={Bad: bad, HTTPException: not_there},
    )


def failed(problem: Bad) -> Response:
    """Return an error as a response."""
    headers = {429: {"Retry-After": "1"}, 401: {"WWW-Authenticate": "Bearer"}}.get(problem.status)
    return JSONResponse(answers.error(problem), problem.status, headers)


def behind_key(app: ASGIApp, key: str) -> ASGIApp:
    """Let only those through who bring the key."""

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            given = dict(scope["headers"]).get(b"authorization", b"")
            if not hmac.compare_digest(given, f"Bearer {key}".encode()):
                problem = Bad(
                    401, "The key is missing or wrong; send it as 'Authorization: Bearer KEY'.", None, "invalid_api_key"
                )
                await failed(problem)(scope, receive, send)
                return
        await app(scope, receive, send)

    return guarded


async def body_of(request: Request) -> bytes:
    """Return a request's body, or raise `Bad` where it is too large, too slow or no JSON."""
    # A web page cannot send this type to another site without asking first, which is never granted here.
    if request.headers.get("content-type", "").partition(";")[0].strip() != "application/json":
        raise Bad(415, "The body must be JSON, with the content type application/json.")
    body = bytearray()
    try:
        with anyio.fail_after(PATIENCE):
            async for chunk in request.stream():
                body += chunk
                if len(body) > LARGEST:
                    raise Bad(413, f"The request is larger than {LARGEST} bytes.")
    except TimeoutError:
        raise Bad(408, f"The request did not come within {PATIENCE:g} seconds.") from None
    return bytes(body)


class Turn:
    """Whose turn it is: one at a time, and so many who wait."""

    def __init__(self, queue: int) -> None:
        self._lock, self._queue, self._inside = anyio.Lock(), queue, 0

    async def take(self, work: Callable[[], Awaitable[None]]) -> None:
        """Do the work when its turn comes, or raise `Bad` where too many wait."""
        if self._inside > self._queue:
            raise Bad(429, f"{self._queue} requests are waiting already; try again in a moment.", None, "queue_full")
        self._inside += 1
        try:
            async with self._lock:
                await work()
        finally:
            self._inside -= 1


def answering(voice: Voice, asked: Chat | Completion, saying: Saying, turn: Turn) -> ASGIApp:
    """Return the response to a request: it waits for its turn, and ends when its client has gone."""

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        async def work() -> None:
            pieces = said(voice, asked, saying)
            if asked.stream:
                await stream(answers.chunks(asked, saying, pieces), pieces, send)
            else:
                answer = await whole(pieces, lambda got: answers.whole(asked, saying, got))
                with anyio.fail_after(PATIENCE):
                    await answer(scope, receive, send)

        async def watch() -> None:
            while (await receive())["type"] != "http.disconnect":
                pass
            group.cancel_scope.cancel()

        async with anyio.create_task_group() as group:
            group.start_soon(watch)
            try:
                await turn.take(work)
            except Bad as problem:
                await failed(problem)(scope, receive, send)
            except (TimeoutError, ClientDisconnect):
                log.warning("a client did not take its answer and was given up")
            group.cancel_scope.cancel()

    return app


async def whole(pieces: Iterator[Any], shape: Callable[[list[Any]], Any]) -> Response:
    """Return the answer once all its pieces are there, or an error."""
    try:
        return JSONResponse(shape([piece async for piece in iterate_in_threadpool(pieces)]))
    except Exception:
        log.exception("the model failed")
        return failed(Bad(500, "The model failed; the server's log says where."))
    finally:
        await closed(pieces)


async def stream(chunks: Iterator[Any], pieces: Iterator[Any], send: Send) -> None:
    """Send chunks as server-sent events, an error as the last of them."""

    async def event(text: str, more: bool = True) -> None:
        with anyio.fail_after(PATIENCE):
            await send({"type": "http.response.body", "body": f"data: {text}\n\n".encode(), "more_body": more})

    headers = [(b"content-type", b"text/event-stream; charset=utf-8"), (b"cache-control", b"no-cache")]
    await send({"type": "http.response.start", "status": 200, "headers": headers})
    try:
        async for chunk in iterate_in_threadpool(chunks):
            await event(json.dumps(chunk, ensure_ascii=False))
    except TimeoutError:
        raise
    except Exception:
        log.exception("the model failed")
        await event(json.dumps(answers.error(Bad(500, "The model failed; the server's log says where."))))
    finally:
        await closed(chunks)
        await closed(pieces)
    await event("[DONE]", more=False)


async def closed(iterator: Any) -> None:
    """Close a generator in a thread, also when nobody waits for it any more: the model has to stop."""
    with anyio.CancelScope(shield=True):
        await run_in_threadpool(iterator.close)
