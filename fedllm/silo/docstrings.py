"""Real text that every install has: the docstrings of installed packages, read without importing them."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
import re
import warnings
from collections.abc import Iterator
from itertools import islice
from pathlib import Path
from typing import TypeAlias

from fedllm.core.errors import FedllmError
from fedllm.silo.sources import Row

SHORTEST, LONGEST = 20, 400
"""The characters that a summary may have."""

CODE = 200
"""The characters that a name with its signature may have in a prompt."""

PER_FILE = 20
"""The rows that one file may give, so that a sample comes from many files."""

HEADINGS = "Args|Arguments|Parameters|Params|Returns?|Yields?|Raises|Examples?|Notes?"

AFTER_SUMMARY = re.compile(rf"({HEADINGS}):?\s*$|[.:>=-]{{2}}|:\w|[\w.*]+ \(.*\):")
"""What a line of a docstring starts with where its summary is over without an empty line."""

Definition: TypeAlias = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def docstring_rows(package: str, limit: int = 600, seed: int = 0) -> list[Row]:
    """Return at most `limit` rows `prompt, response, name` from the docstrings of an installed package.

    Files are taken in an order drawn from `seed`, private modules last, as many as are needed; nothing
    is imported or run.
    """
    rows: list[Row] = []
    seen: set[str] = set()
    for root, file in _files(package, seed):
        new = (row for row in _rows_of(file, _module(package, root, file)) if row["response"] not in seen)
        for row in islice(new, PER_FILE):
            seen.add(row["response"])
            rows.append(row)
        if len(rows) >= limit:
            break
    if not rows:
        raise FedllmError(f"The package {package!r} has no docstring to learn from; name another package.")
    return rows[:limit]


def _files(package: str, seed: int) -> list[tuple[Path, Path]]:
    if not package.isidentifier():
        raise FedllmError(f"{package!r} is not a top-level package; give one name without dots, such as 'numpy'.")
    try:
        spec = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        spec = None
    if spec is None:
        raise FedllmError(f"The package {package!r} is not installed; install it with pip or name another.")
    roots = [Path(place) for place in spec.submodule_search_locations or ()]
    found = [(root, file) for root in roots for file in root.rglob("*.py") if not _is_test(file.relative_to(root))]
    if not roots and spec.origin and spec.origin.endswith(".py"):
        found = [(Path(spec.origin).parent, Path(spec.origin))]

    def place(pair: tuple[Path, Path]) -> tuple[bool, bytes]:
        inside = pair[1].relative_to(pair[0])
        address = f"{seed} {package} {inside.as_posix()}".encode()
        private = any(part.startswith("_") and part != "__init__.py" for part in inside.parts)
        return private, hashlib.blake2b(address, digest_size=8).digest()

    return sorted(found, key=place)


def _is_test(file: Path) -> bool:
    return not {"test", "tests", "testing", "conftest.py"}.isdisjoint(file.parts) or file.name.startswith("test_")


def _module(package: str, root: Path, file: Path) -> str:
    parts = [part for part in file.relative_to(root).with_suffix("").parts if part != "__init__"]
    return package if parts == [package] else ".".join([package, *parts])


def _rows_of(file: Path, module: str) -> Iterator[Row]:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # other people's invalid escapes are not our user's business
            tree = ast.parse(file.read_bytes())
    except (SyntaxError, ValueError, RecursionError, OSError):
        return
    for name, kind, node in _definitions(tree, module, "function"):
        summary = _summary(ast.get_docstring(node) or "")
        if SHORTEST <= len(summary) <= LONGEST:
            kind = "property" if kind == "method" and _is_property(node) else kind
            prompt = f"What does the {kind} `{_code(name, kind, node)}` do?"
            yield {"prompt": prompt, "response": summary, "name": name}


def _definitions(node: ast.AST, prefix: str, kind: str) -> Iterator[tuple[str, str, Definition]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If | ast.Try | ast.With):
            yield from _definitions(child, prefix, kind)
        elif isinstance(child, Definition) and not child.name.startswith("_"):
            name = f"{prefix}.{child.name}"
            yield name, "class" if isinstance(child, ast.ClassDef) else kind, child
            if isinstance(child, ast.ClassDef):
                yield from _definitions(child, name, "method")


def _is_property(node: Definition) -> bool:
    return any(ast.unparse(decorator).endswith("property") for decorator in node.decorator_list)


def _code(name: str, kind: str, node: Definition) -> str:
    maker: ast.AST | None = node
    if isinstance(node, ast.ClassDef):
        maker = next(
            (item for item in node.body if isinstance(item, ast.FunctionDef) and item.name == "__init__"),
            None,
        )
    if kind == "property" or not isinstance(maker, ast.FunctionDef | ast.AsyncFunctionDef):
        return name
    arguments = ast.unparse(maker.args)
    if kind != "function":
        arguments = re.sub(r"^(self|cls)\b[^,]*(, (/, )?)?", "", arguments)
    code = f"{name}({arguments})"
    return code if len(code) <= CODE else code[: CODE - 4].rstrip(" ,") + "...)"


def _summary(docstring: str) -> str:
    lines: list[str] = []
    for line in map(str.strip, docstring.strip().splitlines()):
        if not line or AFTER_SUMMARY.match(line):
            break
        lines.append(line)
    return " ".join(" ".join(lines).split())
