"""docs/architecture.md names files and functions that exist; its rooms are those that `make lint` holds in order."""

from __future__ import annotations

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs/architecture.md").read_text()
NAMED = re.findall(r"`([\w/]+\.py)`(?: \||,) `([\w.]+)`", PAGE)


def names(path: Path) -> set[str]:
    """Classes and functions of a file, methods as ``Class.method``."""
    found = set()
    for node in ast.parse(path.read_text()).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)):
            found.add(node.name)
        if isinstance(node, ast.ClassDef):
            found |= {f"{node.name}.{one.name}" for one in node.body if isinstance(one, ast.FunctionDef)}
    return found


@pytest.mark.parametrize(("file", "name"), NAMED)
def test_what_the_page_names_exists(file, name):
    assert name in names(ROOT / "src/digit" / file)


def test_every_row_of_the_walks_is_read():
    assert len(NAMED) == sum(".py`" in line for line in PAGE.splitlines())


def test_the_rooms_are_those_of_the_import_contract():
    contract = re.search(r"^layers = \[(.*?)\]", (ROOT / "pyproject.toml").read_text(), flags=re.M | re.S)
    layers = re.findall(r'"(\w+)"', contract[1])
    rooms = re.findall(r"^\| `(\w+)` \|", PAGE.split("## The rooms")[1], flags=re.M)
    assert rooms == layers[::-1]
