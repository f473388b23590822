"""What the desk reads of heads, requests and replies, of which it needs no tensors; what it takes out of a reply."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from fedllm.core.errors import Refused
from fedllm.core.types import Request, Scalars
from fedllm.federation.site.disk import on_disk
from fedllm.runtime.spool import LARGEST_HEADER, load_message, save_message
from fedllm.runtime.wire import numbers

LARGEST_REQUEST = 32_000
"""Characters of what a request says beside its tensors; the worker's pipe takes them at once."""

LAST_ROUND = 999_999

OP = re.compile(r"[a-z][a-z_]{0,31}")


def matching(pattern: str, head: Mapping[str, Any], key: str) -> str:
    """Return a word of a head that is safe as the name of a file, or raise `Refused`."""
    value = head.get(key)
    if not isinstance(value, str) or not re.fullmatch(pattern, value):
        raise Refused(f"'{key}' is {value!r:.80}, which does not match {pattern}")
    return value


def whole(head: Mapping[str, Any], key: str) -> int:
    """Return a number of bytes from a head, or raise `Refused`."""
    value = head.get(key)
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value < 1 << 62:
        raise Refused(f"'{key}' is {value!r:.50}, not a number of bytes")
    return value


def request_of(said: Any, site: str) -> Request:
    """Return the request that a server says, without its tensors, or raise `Refused` if it is not one for this site."""
    if not isinstance(said, dict) or said.keys() != {"client", "round", "op", "scalars"}:
        raise Refused("'request' is not an object of client, round, op and scalars")
    client, number, op = said["client"], said["round"], said["op"]
    if client != site:
        raise Refused(f"its request is for {client!r:.70}, and this is {site}")
    if not isinstance(number, int) or isinstance(number, bool) or not 0 <= number <= LAST_ROUND:
        raise Refused(f"its request is for round {number!r:.50}, which is not a number up to {LAST_ROUND}")
    if not isinstance(op, str) or not OP.fullmatch(op):
        raise Refused(f"its request is for {op!r:.70}, which is not the name of a piece of work")
    scalars = scalars_of(said["scalars"])
    if len(json.dumps(said)) > LARGEST_REQUEST or not all(map(math.isfinite, scalars.values())):
        raise Refused("the scalars of its request are too many, or not finite")
    return Request(site, number, op, {}, scalars)


def scalars_of(said: Any) -> Scalars:
    """Return scalars as floats, or raise `Refused`."""
    try:
        return numbers(said)
    except (ValueError, TypeError, OverflowError) as error:
        raise Refused(f"the scalars of its message are not numbers ({error!r:.100})") from error


def reply_scalars(path: Path, request: Request) -> Scalars:
    """Return the scalars of the reply in a file, or raise `Refused` if it does not answer the request."""
    head = head_of(path)
    if (head.get("client"), head.get("round")) != (request.client, request.round):
        raise Refused("the site's worker answered another request")
    return scalars_of(head.get("scalars"))


def head_of(path: Path) -> dict[str, Any]:
    """Return what the message in a file says beside its tensors, or raise `Refused`."""
    try:
        with path.open("rb") as file:
            size = int.from_bytes(file.read(8), "little")
            header = file.read(min(size, LARGEST_HEADER))
        head = json.loads(json.loads(header)["__metadata__"]["fedllm"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise Refused(f"the site's worker wrote no message ({type(error).__name__})") from error
    if not isinstance(head, dict):
        raise Refused("the site's worker wrote a message whose head is not an object")
    return head


def leave_only(path: Path, metrics: Collection[str], scalars: Scalars) -> list[str]:
    """Take the scalars out of the reply in a file that may not leave; return the names of those that do.

    Of a name like `cleaned.read` the part before the point counts.
    """
    sent = {key: value for key, value in scalars.items() if key.partition(".")[0] in metrics}
    if len(sent) < len(scalars):
        tensors, head = load_message(path)
        with on_disk(path):
            save_message(path, tensors, {**head, "scalars": sent})
    return sorted(sent)
