"""Docstrings become rows without importing what they document."""

from __future__ import annotations

import subprocess
import sys

import pytest

from fedllm.core.errors import FedllmError
from fedllm.silo.docstrings import CODE, docstring_rows

MODULE = '''
"""A module's own docstring is not taken."""
raise RuntimeError("imported!")

def area(width: float, height: float = 1.0, *, unit="m") -> float:
    """Return the area of
    a rectangle.

    Parameters
    ----------
    width : float
    """

def _hidden():
    """This function is private and not taken."""

def again():
    """Return the area of a rectangle."""

def short():
    """Too short."""

def bare(x):
    """Args:
        x: a thing that the function takes and nothing else is said.
    """

if True:
    async def wait(seconds):
        r"""Wait for so many seconds \\d before going on."""

class Shape(Base):
    """A shape with a number of corners.
    Args:
        corners: how many
    """

    def __init__(self, corners, /, name="shape"):
        """Make a shape, but dunders are not taken."""

    @property
    def corners(self):
        """The number of corners of the shape."""

    @classmethod
    def from_text(cls, text=None):
        """Read a shape from its text in WKT."""
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    root = tmp_path / "sample_package_x"
    (root / "inner").mkdir(parents=True)
    (root / "tests").mkdir()
    (root / "__init__.py").write_text('def top():\n    """Return what is at the top."""\n')
    (root / "inner" / "shapes.py").write_text(MODULE)
    (root / "inner" / "_private.py").write_text('def late():\n    """Private modules come last."""\n')
    (root / "inner" / "broken.py").write_text("def (:\n")
    (root / "inner" / "binary.py").write_bytes(b"\xff\x00")
    (root / "tests" / "test_x.py").write_text('def test_x():\n    """A test is not documentation."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    return root.name


def test_rows_are_questions_about_names_with_signatures(package):
    rows = {row["name"].removeprefix(package + "."): row for row in docstring_rows(package)}
    assert {name: row["response"] for name, row in rows.items()} == {
        "top": "Return what is at the top.",
        "inner.shapes.area": "Return the area of a rectangle.",
        "inner.shapes.wait": "Wait for so many seconds \\d before going on.",
        "inner.shapes.Shape": "A shape with a number of corners.",
        "inner.shapes.Shape.corners": "The number of corners of the shape.",
        "inner.shapes.Shape.from_text": "Read a shape from its text in WKT.",
        "inner._private.late": "Private modules come last.",
    }
    assert list(rows)[-1] == "inner._private.late"
    shapes = f"{package}.inner.shapes"
    asks = {name.rpartition(".")[2]: row["prompt"] for name, row in rows.items()}
    assert asks["area"] == f"What does the function `{shapes}.area(width: float, height: float=1.0, *, unit='m')` do?"
    assert asks["Shape"] == f"What does the class `{shapes}.Shape(corners, /, name='shape')` do?"
    assert asks["corners"] == f"What does the property `{shapes}.Shape.corners` do?"
    assert asks["from_text"] == f"What does the method `{shapes}.Shape.from_text(text=None)` do?"


def test_a_module_of_one_file(tmp_path, monkeypatch):
    (tmp_path / "sample_module_x.py").write_text('def f():\n    """Return a very good thing."""\n')
    monkeypatch.syspath_prepend(str(tmp_path))
    assert [row["name"] for row in docstring_rows("sample_module_x")] == ["sample_module_x.f"]


def test_limit_and_seed(package):
    rows = docstring_rows("networkx", limit=50)
    assert len(rows) == 50
    assert rows == docstring_rows("networkx", limit=50)
    assert rows != docstring_rows("networkx", limit=50, seed=1)


@pytest.mark.parametrize("package", ["torch", "transformers", "numpy", "networkx"])
def test_the_quickstart_silos_have_enough(package):
    rows = docstring_rows(package)
    responses = [row["response"] for row in rows]
    assert len(rows) >= 400
    assert len(set(responses)) == len(responses)
    assert all(20 <= len(response) <= 400 and "\n" not in response for response in responses)
    assert all(row["name"].startswith(package + ".") for row in rows)
    assert all(len(row["prompt"]) <= CODE + 40 for row in rows)


def test_nothing_is_imported():
    script = (
        "import sys; from fedllm.silo.docstrings import docstring_rows; "
        "docstring_rows('transformers', limit=20); docstring_rows('torch', limit=20); "
        "assert not {'torch', 'transformers'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_what_is_not_there_is_said():
    with pytest.raises(FedllmError, match="not installed; install it with pip"):
        docstring_rows("no_such_package_x")
    with pytest.raises(FedllmError, match="without dots"):
        docstring_rows("numpy.linalg")
    with pytest.raises(FedllmError, match="no docstring"):
        docstring_rows("sys")
