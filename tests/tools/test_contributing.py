"""Functions that documents name exist, and docs/locks.md describes every lock."""

from __future__ import annotations

import ast
import re

import pytest

from tests.support.helpers import ROOT

STEP = re.compile(r"`((?:warabi|warabifs|tests)/[\w/]+\.pyi?):([\w.]+)`")
WALKS = ("CONTRIBUTING.md", "docs/locks.md")
DOCUMENTS = [
    str(page.relative_to(ROOT))
    for page in sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
    if STEP.search(page.read_text())
]
LOCK = re.compile(
    r"\b(?:threading|trio)\.(?:R?Lock|Condition|Semaphore)\(|\bfcntl\.(?:flock|lockf)\("
)


def steps(document: str) -> list[tuple[str, str]]:
    return STEP.findall((ROOT / document).read_text())


def named(nodes: list[ast.stmt], name: str) -> ast.stmt | None:
    """The statement that defines *name*: a function, a class, or an assignment."""
    for node in nodes:
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if node.name == name:
                return node
        elif isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if any(isinstance(target, ast.Name) and target.id == name for target in targets):
                return node
    return None


def attribute_of(node: ast.ClassDef, name: str) -> bool:
    """Whether a method of the class assigns ``self.name``."""
    return any(
        isinstance(found, ast.Attribute)
        and isinstance(found.ctx, ast.Store)
        and isinstance(found.value, ast.Name)
        and found.value.id == "self"
        and found.attr == name
        for found in ast.walk(node)
    )


def is_defined(path: str, qualified: str) -> bool:
    nodes = ast.parse((ROOT / path).read_text()).body
    names = qualified.split(".")
    for position, name in enumerate(names):
        node = named(nodes, name)
        if node is None:
            return False
        nodes = getattr(node, "body", [])
        rest = names[position + 1 :]
        if isinstance(node, ast.ClassDef) and len(rest) == 1 and attribute_of(node, rest[0]):
            return True
    return True


@pytest.mark.parametrize("document", DOCUMENTS)
def test_every_step_exists(document: str) -> None:
    found = steps(document)
    assert len(found) > 20 or document not in WALKS
    assert [step for step in found if not is_defined(*step)] == []


def test_every_lock_is_described() -> None:
    described = {path for path, _ in steps("docs/locks.md")}
    locking = {
        str(path.relative_to(ROOT))
        for package in ("warabi", "warabifs")
        for path in (ROOT / package).rglob("*.py")
        if LOCK.search(path.read_text())
    }
    assert locking - described == set()
