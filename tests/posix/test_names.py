"""Names are bytes, 255 of them at most."""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable
from pathlib import Path

from tests.mount.support import fails_with
from tests.posix.support import (
    file,
    opened,
)

NAMES = [
    b"a b", b"new\nline", b"tab\t", b"-dash", b"back\\slash", b"quote'\"", b"$(echo)", b"*", b"...",
    b"trailing.", b" ", b"\xff\xfe\x80", "größe ✓ 文件".encode(), b"\x01", b"x" * 255,
    "é".encode() * 127, b"0123456789abcdef0123456789abcdef", b"lost+found", b".hidden", b"%s%n",
]  # fmt: skip


def test_names_are_bytes(where: Path) -> None:
    root = os.fsencode(where)
    for number, name in enumerate(NAMES):
        with open(root + b"/" + name, "xb") as new:
            new.write(b"%d" % number)
    assert sorted(os.listdir(root)) == sorted(NAMES)
    for number, name in enumerate(NAMES):
        with open(root + b"/" + name, "rb") as found:
            assert found.read() == b"%d" % number
        os.rename(root + b"/" + name, root + b"/" + name[:200] + b"~")
        os.unlink(root + b"/" + name[:200] + b"~")
    assert os.listdir(root) == []


def test_names_differ_by_case_and_normalisation(where: Path) -> None:
    names = {"file", "File", "FILE", "\u00e9", "e\u0301"}
    for name in names:
        file(where / name, name.encode())
    assert set(os.listdir(where)) == names
    assert all((where / name).read_bytes() == name.encode() for name in names)


def test_a_name_has_at_most_255_bytes(where: Path) -> None:
    longest, too_long = where / ("x" * 255), where / ("y" * 256)
    file(longest)
    calls: list[Callable[[], object]] = [
        lambda: file(too_long),
        lambda: too_long.mkdir(),
        lambda: too_long.symlink_to("x"),
        lambda: os.mkfifo(too_long),
        lambda: os.link(longest, too_long),
        lambda: os.rename(longest, too_long),
        lambda: too_long.stat(),
        lambda: too_long.unlink(),
        lambda: too_long.rmdir(),
    ]
    for call in calls:
        with fails_with(errno.ENAMETOOLONG):
            call()
    assert os.listdir(where) == [longest.name]


def test_paths_may_be_deep(where: Path) -> None:
    with contextlib.ExitStack() as stack:
        directory = stack.enter_context(opened(where, os.O_RDONLY))
        for depth in range(50):
            os.mkdir(f"directory{depth}", dir_fd=directory)
            fd = os.open(f"directory{depth}", os.O_RDONLY, dir_fd=directory)
            directory = fd
            stack.callback(os.close, fd)
        fd = os.open("file", os.O_CREAT | os.O_WRONLY, dir_fd=directory)
        os.close(fd)
    assert len(list(where.rglob("*"))) == 51
