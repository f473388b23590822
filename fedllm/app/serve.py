"""Serve a run, an adapter or a model to programs that speak OpenAI's protocol."""

from __future__ import annotations

import ipaddress
import socket
from pathlib import Path

from rich.console import Console

from fedllm.app.chat import context, say
from fedllm.app.result import open_result, spoken
from fedllm.core.errors import FedllmError


def serve(
    target: Path,
    console: Console,
    *,
    host: str = "127.0.0.1",
    port: int = 8000,
    key: str | None = None,
    queue: int = 16,
    base: bool = False,
    dtype: str | None = None,
) -> None:
    """Answer requests until the process is stopped."""
    try:
        import uvicorn

        from fedllm.app.endpoint.server import application
        from fedllm.app.endpoint.speech import Voice
    except ModuleNotFoundError as error:
        raise FedllmError(f"fedllm serve needs the package {error.name}; run: pip install 'fedllm[serve]'") from error
    if key is not None and not (key.isascii() and key.isprintable() and key.strip()):
        raise FedllmError("The key is empty or has characters that no header can carry; give plain letters and digits.")
    listening = bound(host, port)
    opened = open_result(target, base, dtype=dtype)
    tokenizer = spoken(opened)
    name = target.resolve().name
    voice = Voice(name, opened.note, opened.model, tokenizer, context(opened))
    local = is_local(host)
    address = f"[{host}]" if ":" in host else host
    url = f"http://{address}:{listening.getsockname()[1]}/v1"
    say(console, f"Serving {opened.note} as '{name}' at {url}")
    weights = next(opened.model.parameters())
    say(
        console,
        f"{voice.context} tokens in all, in {str(weights.dtype).removeprefix('torch.')} on {weights.device.type}; "
        f"one request at a time, {queue} may wait; Ctrl-C ends",
    )
    if not local and not key:
        say(console, "Whoever can reach this machine may use it, since there is no --key, and all travels in the clear")
    config = uvicorn.Config(
        application(voice, key, queue, local),
        log_level="warning",
        limit_concurrency=queue + 64,
        timeout_keep_alive=30,
        timeout_graceful_shutdown=3,
        server_header=False,
    )
    with listening:
        uvicorn.Server(config).run(sockets=[listening])


def bound(host: str, port: int) -> socket.socket:
    """Return a socket that listens there."""
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except (OSError, OverflowError) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        raise FedllmError(
            f"Nothing can listen at {host} port {port} ({reason}); choose another with --port."
        ) from error


def is_local(host: str) -> bool:
    """Say whether only this machine can reach a host's name."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
