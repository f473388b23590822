"""Every claim of what is protected names tests, and they are there."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
ROWS = re.findall(r"^\| (.*?) \| (.*?) \|$", (ROOT / "docs" / "threat-model.md").read_text(encoding="utf-8"), re.M)
CLAIMS = [(claim, named) for claim, named in ROWS if (claim, named) != ("claim", "test")]


def test_claims_are_found():
    assert len(CLAIMS) > 30


@pytest.mark.parametrize(("claim", "named"), CLAIMS)
def test_each_claim_names_files_that_have_tests(claim, named):
    files = re.findall(r"`(.*?)`", re.sub(r"\(.*?\)", "", named))
    assert files, claim
    for file in files:
        functions = [node for node in ast.walk(ast.parse((ROOT / file).read_text(encoding="utf-8"))) if is_test(node)]
        assert functions, file


def is_test(node):
    return isinstance(node, ast.FunctionDef) and node.name.startswith("test_")
