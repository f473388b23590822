"""Who may import whom; that `import fedllm` is cheap; and that no file grows out of hand."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fedllm

ROOT = Path(fedllm.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

ALLOWED = {
    "core": {"core"},
    "silo": {"silo", "core"},
    "exchange": {"exchange", "core"},
    "runtime": {"runtime", "core"},
    "algorithms": {"algorithms", "core", "silo", "exchange"},
    "evaluation": {"evaluation", "core", "silo", "exchange"},
    "audit": {"audit", "core", "silo", "exchange", "evaluation"},
    "federation": {"federation", "core", "runtime", ""},
    "app": {"app", "core", "silo", "exchange", "runtime", "algorithms", "evaluation", "audit", "federation", ""},
}
"""Folders of the package that a folder may import; the empty one is the package itself."""


def imports(path):
    """Every module that a file imports, wherever in it; `from a import b` may be the module `a.b`."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            if node.module == "fedllm":
                known = {each.name for each in ROOT.iterdir()}
                yield from (f"fedllm.{a.name}" if a.name in known else "fedllm" for a in node.names)
            else:
                yield node.module


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_a_folder_imports_only_what_it_may(path):
    place = path.relative_to(ROOT)
    if len(place.parts) == 1:
        return
    folder = place.parts[0]
    own = {(*name.split("."), "")[1] for name in imports(path) if name.partition(".")[0] == "fedllm"}
    assert own <= ALLOWED[folder], f"{place} imports {own - ALLOWED[folder]}"


@pytest.mark.parametrize(("one", "other"), [("site", "server"), ("server", "site")])
def test_a_site_and_the_server_share_no_code_of_their_own(one, other):
    found = {name for path in (ROOT / "federation" / one).glob("*.py") for name in imports(path)}
    assert found and not [name for name in found if name.startswith(f"fedllm.federation.{other}")]


def test_every_folder_has_a_rule():
    assert {path.relative_to(ROOT).parts[0] for path in FILES if path.parent != ROOT} <= ALLOWED.keys()


def test_core_needs_torch_and_the_standard_library_only():
    allowed = {"torch", "fedllm", *sys.stdlib_module_names}
    for path in (ROOT / "core").glob("*.py"):
        assert {name.partition(".")[0] for name in imports(path)} <= allowed, path


def test_importing_the_package_loads_no_torch():
    code = (
        "import sys, fedllm; print(sorted({'torch', 'transformers', 'peft', 'numpy', 'pydantic'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("module", ["cli", "office", "site_template"])
def test_what_a_quick_command_imports_loads_no_torch(module):
    code = f"import sys, fedllm.app.{module}; print(sorted({{'torch', 'transformers', 'peft'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_a_sites_daemon_loads_no_models():
    parts = "fedllm.app.site, fedllm.app.site_privacy, fedllm.federation.site.desk, fedllm.silo.models"
    code = f"import sys, {parts}; print(sorted({{'transformers', 'peft', 'datasets'}} & sys.modules.keys()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT.parent)
    assert done.stdout.strip() == "[]"


def test_no_file_is_longer_than_400_lines():
    tests = Path(__file__).resolve().parents[1]
    for path in [*FILES, *tests.rglob("*.py")]:
        assert len(path.read_text(encoding="utf-8").splitlines()) <= 400, path
