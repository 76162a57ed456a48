"""chattr(1) and lsattr(1): immutable and append-only files and directories, as on ext4."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import os
import struct
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.support import BACKENDS, PASSED, fails_with, run
from tests.posix.conftest import MOUNTED
from tests.posix.support import OLD, check, file, libc, opened
from warabifs.frontends.base import Ability

pytestmark = pytest.mark.needs(Ability.INODE_FLAGS)

ORACLE = pytest.mark.parametrize(
    "shared",
    ["ext4", *(each for each in MOUNTED if each not in PASSED)],
    indirect=True,
    scope="package",
)


@contextlib.contextmanager
def flagged(path: Path, flags: str) -> Iterator[None]:
    run("chattr", f"+{flags}", path)
    try:
        assert set(flags) <= set(run("lsattr", "-d", path).stdout.split()[0])
        yield
    finally:
        run("chattr", f"-{flags}", path)
    assert not set(flags) & set(run("lsattr", "-d", path).stdout.split()[0])


def write(path: Path, flags: int = 0) -> None:
    fd = os.open(path, os.O_WRONLY | flags)
    try:
        os.pwrite(fd, b"x", 0)
    finally:
        os.close(fd)


def append(path: Path) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        os.write(fd, b"x")


def fallocate(path: Path, mode: int) -> None:
    with opened(path, os.O_WRONLY | os.O_APPEND) as fd:
        check(libc.fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(4096)))


CHANGES: dict[str, Callable[[Path], object]] = {
    "write": write,
    "truncate": lambda path: os.truncate(path, 2),
    "grow": lambda path: os.truncate(path, 20),
    "replace": lambda path: path.write_bytes(b"new"),
    "chmod": lambda path: path.chmod(0o600),
    "chown": lambda path: os.chown(path, 1, 1),
    "set a list": lambda path: os.setxattr(
        path, "system.posix_acl_access",
        struct.pack("<I", 2) + b"".join(
            struct.pack("<HHI", *each)
            for each in ((1, 7, 0), (2, 6, 5), (4, 5, 0), (16, 7, 0), (32, 5, 0))
        ),
    ),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"2"),
    "removexattr": lambda path: os.removexattr(path, "user.x"),
    "link": lambda path: os.link(path, path.with_name("link")),
    "rename": lambda path: path.rename(path.with_name("other")),
    "be replaced": lambda path: file(path.with_name("new")).rename(path),
    "unlink": lambda path: path.unlink(),
    "punch": lambda path: fallocate(path, 3),
    "zero": lambda path: fallocate(path, 16),
}  # fmt: skip
ONLY_IMMUTABLE: dict[str, Callable[[Path], object]] = {
    "append": append,
    "touch": lambda path: run("touch", path, check=False).check_returncode(),
    "allocate": lambda path: fallocate(path, 0),
}


@pytest.fixture
def path(where: Path) -> Path:
    path = file(where / "file", b"0123456789")
    os.setxattr(path, "user.x", b"1")
    return path


@ORACLE
@pytest.mark.parametrize("flag", ["i", "a"])
@pytest.mark.parametrize("change", CHANGES)
def test_what_cannot_be_done(path: Path, flag: str, change: str) -> None:
    before = path.read_bytes(), path.stat()
    with flagged(path, flag):
        with fails_with(errno.EPERM):
            CHANGES[change](path)
        assert path.read_bytes() == before[0]
        assert path.stat().st_mtime_ns == before[1].st_mtime_ns
        assert os.getxattr(path, "user.x") == b"1"
    CHANGES[change](path)


@ORACLE
@pytest.mark.parametrize("change", ["append", "allocate"])
def test_what_can_be_done_to_an_append_only_file(path: Path, change: str) -> None:
    with flagged(path, "i"), fails_with(errno.EPERM):
        ONLY_IMMUTABLE[change](path)
    with flagged(path, "a"):
        ONLY_IMMUTABLE[change](path)
    if change == "append":
        assert path.read_bytes() == b"0123456789x"


@ORACLE
def test_touch(path: Path) -> None:
    os.utime(path, ns=(OLD, OLD))
    with flagged(path, "i"):
        assert run("touch", path, check=False).returncode != 0
        assert path.stat().st_mtime_ns == OLD
    with flagged(path, "a"):
        run("touch", path)
        assert path.stat().st_mtime_ns != OLD


@ORACLE
@pytest.mark.parametrize("flag", ["i", "a"])
def test_directories(where: Path, flag: str) -> None:
    (directory := where / "directory").mkdir()
    inside = file(directory / "file", b"data")
    with flagged(directory, flag):
        for change in (
            inside.unlink,
            lambda: inside.rename(where / "moved"),
            lambda: file(where / "new").rename(inside),
            directory.rmdir,
            lambda: directory.rename(where / "other"),
            lambda: directory.chmod(0o700),
        ):
            with fails_with(errno.EPERM):
                change()
        inside.write_bytes(b"changed")
        creations: list[Callable[[], object]] = [
            lambda: file(directory / "second"),
            (directory / "below").mkdir,
            lambda: (directory / "link").symlink_to("x"),
            lambda: os.link(inside, directory / "third"),
            lambda: file(where / "another").rename(directory / "another"),
        ]
        for create in creations:
            if flag == "i":
                with fails_with(errno.EPERM):
                    create()
            else:
                create()
    assert inside.read_bytes() == b"changed"
    assert (directory / "second").exists() == (flag == "a")


@ORACLE
def test_only_root_sets_them(path: Path) -> None:
    os.chown(path, 1000, 1000)
    as_user = run("setpriv", "--reuid=1000", "--clear-groups", "chattr", "+i", path, check=False)
    assert as_user.returncode != 0
    assert "i" not in run("lsattr", path).stdout.split()[0]


@ORACLE
def test_files_that_are_open_are_not_written(path: Path) -> None:
    with opened(path) as fd, flagged(path, "i"):
        with fails_with(errno.EPERM):
            os.pwrite(fd, b"x", 0)
        assert os.pread(fd, 10, 0) == b"0123456789"


@pytest.mark.parametrize("shared", [*BACKENDS, "engine", *PASSED], indirect=True, scope="package")
def test_other_flags_are_refused(where: Path, passed: bool) -> None:
    path = file(where / "file")
    for flag in ("A", "c", *("ia" if passed else "")):
        done = run("chattr", f"+{flag}", path, check=False)
        assert done.returncode != 0
        assert "not supported" in done.stderr
    run("chattr", "+d", path)
    assert "d" in run("lsattr", path).stdout.split()[0]
