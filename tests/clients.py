"""Clients that do little, which a site in a process of its own can import."""

from __future__ import annotations

import time

from fedllm.core.round import encoding
from fedllm.core.types import Reply
from fedllm.exchange.cast import cast
from fedllm.exchange.clip import clip
from fedllm.exchange.top_k import top_k
from tests.fake_site import stepping

TRANSFORMS = [top_k(0.3), cast(), clip(0.7)]


def pulling(request, own):
    """A client whose update depends on its name and on all that it was sent."""
    tensors = {name: value * 0.1 + len(own.name) for name, value in request.tensors.items()}
    return Reply(own.name, request.round, tensors, float(len(own.name))), {}


ENCODED = encoding(pulling, TRANSFORMS)


def encoded(request, own):
    return ENCODED(request, own)


def failing(request, own):
    """A client that cannot at one of the sites."""
    if own.name == "bb":
        raise ValueError("the text is gone")
    return stepping(request, own)


def slowly(request, own):
    """A client that takes long at all sites but one."""
    time.sleep(0 if own.name == "a" else 15)
    return stepping(request, own)
