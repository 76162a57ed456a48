"""The files of a target are its owner's alone, whatever the umask is."""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from tests.storage.test_checksums import open_target
from tests.support.helpers import run_python
from tests.tools.test_cli import ok, run, serving


@contextmanager
def umask(mask: int) -> Iterator[None]:
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


def check_private(directory: Path) -> None:
    """Everything in *directory* is for its owner alone, and for that one in full."""
    found = [Path(top, name) for top, below, files in os.walk(directory) for name in below + files]
    assert found
    for path in found:
        mode = path.lstat().st_mode
        wanted = 0o700 if stat.S_ISDIR(mode) else 0o600
        assert stat.S_IMODE(mode) == wanted, (path, oct(mode))


@pytest.mark.parametrize("mask", [0, 0o022, 0o077])
@pytest.mark.parametrize("kind", ["file", "pmem"])
def test_a_new_target(kind: str, mask: int, tmp_path: Path) -> None:
    with umask(mask):
        with open_target(kind, tmp_path / "target") as target:
            region = target.create(100_000)
            target.write(region, 0, b"data", persist=True)
            assert (tmp_path / "target-wal").exists()
            check_private(tmp_path)
        check_private(tmp_path)
        with open_target(kind, tmp_path / "target") as target:
            assert target.read(region, 0, 4) == b"data"
            check_private(tmp_path)


def test_an_empty_file_that_becomes_a_target(tmp_path: Path) -> None:
    path = tmp_path / "target"
    path.touch(mode=0o644)
    with open_target("file", path):
        check_private(tmp_path)


def test_targets_of_before_are_mended_when_they_are_opened(tmp_path: Path) -> None:
    path = tmp_path / "target"
    with open_target("file", path) as target:
        target.create(0)
    path.chmod(0o664)
    (tmp_path / "target.regions").chmod(0o755)
    with open_target("file", path):
        check_private(tmp_path)
    check_private(tmp_path)
    path.chmod(0o664)
    ok("fsck", path)  # which changes nothing
    assert stat.S_IMODE(path.stat().st_mode) == 0o664


OPEN = """
import os, sys
from pathlib import Path
from tests.storage.test_checksums import open_target
os.setgroups([2])
os.setgid(2)
os.setuid(1)
with open_target("file", Path(sys.argv[1])) as target:
    target.create(10)
"""


def test_a_target_of_another_owner_is_opened_as_it_is(tmp_path: Path) -> None:
    """By a group that was given the permissions for it."""
    top = Path("/tmp", f"warabi-private-{os.getpid()}")
    top.mkdir()
    top.chmod(0o777)
    path = top / "target"
    try:
        with open_target("file", path) as target:
            target.create(0)
        for place in (
            path,
            *path.parent.rglob("target.regions"),
            *top.rglob("target.regions/**/*"),
        ):
            os.chown(place, 0, 2)
            place.chmod(0o770 if place.is_dir() else 0o660)
        done = run_python(OPEN, str(path))
        assert done.returncode == 0, done.stderr
        assert stat.S_IMODE(path.stat().st_mode) == 0o660
    finally:
        shutil.rmtree(top)


def test_a_migrated_target(tmp_path: Path) -> None:
    (tmp_path / "to").mkdir(mode=0o700)
    empty = tmp_path / "empty.json"
    empty.write_text('{"providers": [{"type": "warabi"}]}')
    empty.chmod(0o600)
    with umask(0), serving("-t", f"file:{tmp_path}/from") as source, serving(empty) as other:
        here, there = source.address, other.address
        ok("put", here, "-n", "/name", stdin=b"data")
        ok("migrate", here, "0", there, "0", "--new-root", f"{tmp_path}/to/target")
        assert ok("get", there, "/name") == b"data"
        check_private(tmp_path)
        source.end()
        other.end()
    check_private(tmp_path / "to")


def test_what_a_repair_and_an_export_make(tmp_path: Path) -> None:
    path = tmp_path / "target"
    with umask(0):
        with open_target("file", path) as target:
            target.create_and_write(b"data" * 1000, persist=True)
        path.write_bytes(b"no database any more")
        assert run("fsck", "--repair", path).returncode == 1
        check_private(tmp_path)
        ok("export", path, tmp_path / "archive.tar")
        ok("import", tmp_path / "archive.tar", tmp_path / "again")
        check_private(tmp_path)
