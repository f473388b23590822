"""The templates of units, Compose files and charts, filled in with each format's own quotes."""

from __future__ import annotations

import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined

import fedllm

TEMPLATES = Path(__file__).parent / "templates"


def fill(template: str, facts: Mapping[str, Any]) -> str:
    """Return a template filled in with these facts and the versions of fedllm and Python."""
    pages = Environment(  # the braces are Helm's own
        loader=FileSystemLoader(TEMPLATES),
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        comment_start_string="[#",
        comment_end_string="#]",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=StrictUndefined,
        autoescape=False,
    )
    pages.filters |= {"unit": _for_unit, "word": _for_command, "quoted": _quoted, "composed": _for_compose}
    versions = {"version": fedllm.__version__, "python": f"{sys.version_info.major}.{sys.version_info.minor}"}
    return pages.get_template(template).render(**versions, **facts)


def _quoted(value: object) -> str:
    return json.dumps(value if isinstance(value, list) else str(value), ensure_ascii=False)


def _for_compose(value: object) -> str:
    return _quoted(value).replace("$", "$$")


def _for_unit(value: object) -> str:
    return '"' + str(value).replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%") + '"'


def _for_command(value: object) -> str:
    return _for_unit(value).replace("$", "$$")
