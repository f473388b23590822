"""A tiny model behind an endpoint, in a thread, for tests."""

from __future__ import annotations

import socket
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fedllm.app.endpoint.server import application
from fedllm.app.endpoint.speech import Voice
from tests.tiny import tiny_model, tiny_tokenizer


def tiny_voice(chat: bool = True, context: int = 512) -> Voice:
    """Return a tiny model to be served; its scores are those of `tiny_model()`."""
    return Voice("tiny", "a tiny model", tiny_model(), tiny_tokenizer(chat=chat), context)


@contextmanager
def served(app) -> Iterator[str]:
    """Serve an ASGI application; yield its URL."""
    import uvicorn

    server = uvicorn.Server(uvicorn.Config(app, log_level="error", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            yield f"http://127.0.0.1:{listening.getsockname()[1]}/v1"
        finally:
            server.should_exit = True
            thread.join()


def tiny_app(key: str | None = None, queue: int = 16, chat: bool = True):
    """Return the application that serves the tiny model."""
    return application(tiny_voice(chat), key, queue)
