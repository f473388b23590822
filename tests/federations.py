"""Sites without an engine, for tests: real desks and real workers, reached by a line inside this process."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from fedllm.app.site import known
from fedllm.app.site_privacy import spending
from fedllm.federation.site.desk import Desk
from fedllm.federation.site.policy import read_site
from fedllm.runtime.line import Line, decode, encode
from fedllm.silo.models import weights_sha256

WORKER = [sys.executable, "-m", "fedllm.app.worker"]


def make_site(folder: Path, name: str, data: str, model: str, policy: str = "", own: str = "") -> Path:
    """Write a site's folder; `own` says what the site's model is, where that is not what the recipe names."""
    folder.mkdir(parents=True)
    text = f'name = "{name}"\nthreads = 1\n[data]\n{data}\n[models]\n"{model}" = {{{own}}}\n[policy]\n{policy}\n'
    (folder / "site.toml").write_text(text)
    return folder / "site.toml"


@contextmanager
def desks(files: list[Path]) -> Iterator[dict[str, Desk]]:
    """Open the desks of sites."""
    with ExitStack() as stack:
        found = {}
        for file in files:
            site = read_site(file, known())
            env = {"FEDLLM_SITE": str(file)}
            found[site.name] = stack.enter_context(
                Desk(site, WORKER, known(), weights_sha256, env, spending(site, file))
            )
        yield found


def line_to(sites: dict[str, Desk]) -> Line:
    """Return a line to desks in this process."""

    def call(site, head, body, seconds):
        return decode(sites[site].answer(encode(head, body)))

    return Line(call, lambda: list(sites))
