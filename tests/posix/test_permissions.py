"""Permission bits of owner, group and others."""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.posix.support import (
    NOBODY,
    file,
    user,
)

ATTEMPTS: dict[str, Callable[[Path], object]] = {
    "read": lambda path: os.close(os.open(path, os.O_RDONLY)),
    "write": lambda path: os.close(os.open(path, os.O_WRONLY)),
    "truncate": lambda path: os.truncate(path, 0),
    "chmod": lambda path: path.chmod(0o777),
    "chown": lambda path: os.chown(path, NOBODY, -1),
    "utime": lambda path: os.utime(path, ns=(1, 1)),
    "touch": lambda path: os.utime(path),
    "unlink": lambda path: path.unlink(),
    "list": lambda path: os.listdir(path),
    "create": lambda path: (path / "new").touch(exist_ok=False),
    "lookup": lambda path: (path / "there").stat(),
    "setxattr": lambda path: os.setxattr(path, "user.x", b"x"),
}


def attempt(path: Path, call: str) -> str:
    """What becomes of a call by nobody: an errno's name, or "allowed"."""
    with user():
        try:
            ATTEMPTS[call](path)
        except OSError as error:
            return errno.errorcode[error.errno or 0]
        return "allowed"


@pytest.mark.parametrize(
    ("mode", "owner", "call", "answer"),
    [
        (0o600, 0, "read", "EACCES"),
        (0o604, 0, "read", "allowed"),
        (0o604, 0, "write", "EACCES"),
        (0o604, 0, "truncate", "EACCES"),
        (0o602, 0, "write", "allowed"),
        (0o602, 0, "truncate", "allowed"),
        (0o077, NOBODY, "read", "EACCES"),  # the owner's bits count for the owner
        (0o600, NOBODY, "write", "allowed"),
        (0o666, 0, "chmod", "EPERM"),
        (0o600, NOBODY, "chmod", "allowed"),
        (0o666, 0, "chown", "EPERM"),
        (0o666, 0, "utime", "EPERM"),
        (0o666, 0, "touch", "allowed"),
        (0o644, 0, "touch", "EACCES"),
        (0o644, 0, "setxattr", "EACCES"),
        (0o646, 0, "setxattr", "allowed"),
        (0o644, 0, "unlink", "EACCES"),  # its directory is root's
    ],
)
def test_another_user_does_with_a_file_what_its_mode_allows(
    where: Path, mode: int, owner: int, call: str, answer: str
) -> None:
    path = file(where / "file", b"data")
    os.chown(path, owner, owner)
    path.chmod(mode)
    assert attempt(path, call) == answer


@pytest.mark.parametrize(
    ("mode", "call", "answer"),
    [
        (0o755, "create", "EACCES"),
        (0o757, "create", "allowed"),
        (0o756, "create", "EACCES"),
        (0o751, "list", "EACCES"),
        (0o754, "list", "allowed"),
        (0o751, "lookup", "allowed"),
        (0o754, "lookup", "EACCES"),
    ],
)
def test_another_user_does_with_a_directory_what_its_mode_allows(
    where: Path, mode: int, call: str, answer: str
) -> None:
    directory = where / "directory"
    directory.mkdir()
    file(directory / "there")
    directory.chmod(mode)
    assert attempt(directory, call) == answer


def test_in_a_sticky_directory_only_the_owner_removes(where: Path) -> None:
    directory = where / "directory"
    directory.mkdir()
    directory.chmod(0o1777)
    file(directory / "roots")
    os.chown(file(directory / "own"), NOBODY, NOBODY)
    assert attempt(directory / "roots", "unlink") == "EPERM"
    assert attempt(directory / "own", "unlink") == "allowed"


def test_a_new_file_belongs_to_its_maker(where: Path) -> None:
    where.chmod(0o777)
    with user():
        (where / "x").mkdir()
        file(where / "x" / "file")
    assert ((where / "x").stat().st_uid, (where / "x" / "file").stat().st_gid) == (NOBODY, NOBODY)
