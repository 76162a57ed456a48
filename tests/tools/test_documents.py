"""Links, and files that documents and code name, exist; neither uses words that were replaced."""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

from tests.support.helpers import ROOT

FOLDERS = ("docs", "benchmarks", "examples", "tests", "warabi", "warabifs", "tools")
LINK = re.compile(r"\]\(([^)\s]+)\)")
FENCE = re.compile(r"^```.*?^```$", re.DOTALL | re.MULTILINE)
CODE = re.compile(r"`[^`\n]*`")
HEADING = re.compile(r"^#+ (.*)$", re.MULTILINE)
NAMED = re.compile(r"\b(?:docs|benchmarks|examples)/[\w/]+\.md\b")
SOURCE = re.compile(r"\b(?:warabi|warabifs|mochi|tests|benchmarks)/[\w/]+\.(?:py|c)\b")

REPLACED = {
    r"a defect in": "unhandled exception in",
    r"medium": "stable storage, storage device",
    r"life signs?": "sign of life, liveness",
    r"dawdl\w*": "slow",
    r"[Nn]obody|[Ss]omebody|[Aa]nybody|[Ww]hoever": "the process, client or user",
}
"""What must not come back in prose, as patterns of whole words; and what to write instead."""

DOCUMENTS = sorted(
    [*ROOT.glob("*.md"), *(page for folder in FOLDERS for page in (ROOT / folder).rglob("*.md"))]
)


@cache
def anchors(page: Path) -> frozenset[str]:
    """The anchors of the page's headings, as GitHub makes them."""
    found: dict[str, int] = {}
    names = set()
    for heading in HEADING.findall(FENCE.sub("", page.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading)
        name = re.sub(r"[^\w\- ]", "", text.lower()).strip().replace(" ", "-")
        names.add(f"{name}-{found[name]}" if name in found else name)
        found[name] = found.get(name, 0) + 1
    return frozenset(names)


def broken_links(page: Path) -> Iterator[str]:
    for link in LINK.findall(CODE.sub("", FENCE.sub("", page.read_text()))):
        if re.match(r"[a-z]+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        if not target.exists() or not target.is_relative_to(ROOT):
            yield f"{link}: there is no such file"
        elif anchor and anchor not in anchors(target):
            yield f"{link}: there is no such heading"


@pytest.mark.parametrize("page", DOCUMENTS, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_and_anchors(page: Path) -> None:
    assert list(broken_links(page)) == []


def test_broken_links_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(globals(), "ROOT", tmp_path)
    page = tmp_path / "page.md"
    page.write_text(
        "# A `title`, twice\n\n## A title, twice\n"
        "[right](#a-title-twice) [right](#a-title-twice-1)\n"
        "[wrong](#a-title) [gone](gone.md) [out](../out.md) `[code](is.md)` [web](https://a.b)\n"
        "```\n# no heading\n[no](link.md)\n```\n"
    )
    assert [line.split(":")[0] for line in broken_links(page)] == [
        "#a-title", "gone.md", "../out.md",
    ]  # fmt: skip


def test_the_index_has_every_page() -> None:
    index = (ROOT / "docs" / "README.md").read_text()
    pages = {page.name for page in (ROOT / "docs").glob("*.md")} - {"README.md"}
    assert {page for page in pages if f"({page})" not in index} == set()


def test_sources_that_documents_name_exist() -> None:
    named = {(str(page), name) for page in DOCUMENTS for name in SOURCE.findall(page.read_text())}
    assert len(named) > 100
    assert {one for one in named if not (ROOT / one[1]).exists()} == set()


def test_documents_that_are_named_exist() -> None:
    files = [
        *DOCUMENTS,
        *(ROOT / "tools").iterdir(),
        *(path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")),
    ]
    named = {(str(path), name) for path in files for name in NAMED.findall(path.read_text())}
    assert len(named) > 20
    assert {one for one in named if not (ROOT / one[1]).exists()} == set()


def replaced_words(text: str) -> list[str]:
    """Names in capitals, or with underscores, may contain the words."""
    return [
        f"{found[0]}: {instead}"
        for words, instead in REPLACED.items()
        for found in re.finditer(rf"\b(?:{words})\b", text)
    ]


def test_replaced_words_do_not_come_back() -> None:
    files = [
        ROOT / "README.md",
        *(ROOT / "docs").glob("*.md"),
        *(
            path
            for folder in ("warabi", "warabifs", "mochi", "examples", "benchmarks")
            for path in (ROOT / folder).rglob("*.*")
            if path.suffix in {".py", ".c", ".md"}
        ),
    ]
    assert len(files) > 200
    found = {(str(path), word) for path in files for word in replaced_words(path.read_text())}
    assert found == set()


def riddles(text: str) -> list[str]:
    """Names of tests that contain a replaced word, or whose subject is a relative "who"."""
    words = re.compile(f"test_who_|{'|'.join(map(str.lower, REPLACED))}")
    return [name for name in re.findall(r"def (test_\w+)\(", text) if words.search(name)]


def test_names_of_tests_are_no_riddles() -> None:
    assert riddles("def " + "test_who_waits(); def " + "test_a_wait()") == ["test_who_waits"]
    files = sorted((ROOT / "tests").rglob("test_*.py"))
    assert len(files) > 100
    assert [name for path in files for name in riddles(path.read_text())] == []


def test_replaced_words_are_found() -> None:
    assert replaced_words(
        "Nobody; a defect in (NOBODY, by_medium) the MEDIUM of a dawdling peer"
    ) == [
        "a defect in: unhandled exception in",
        "dawdling: slow",
        "Nobody: the process, client or user",
    ]
