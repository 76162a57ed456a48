"""open(2): flags, modes and permissions."""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
import stat
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from tests.mount.support import another_python, fails_with, line_of, run, wait_until
from tests.posix.support import (
    NOBODY,
    file,
    make,
    opened,
    updated,
    user,
)


def test_exclusive_creation_refuses_what_exists(where: Path) -> None:
    flags = os.O_CREAT | os.O_EXCL | os.O_WRONLY
    with opened(where / "file", flags):
        pass
    with fails_with(errno.EEXIST):
        os.open(where / "file", flags)
    (where / "link").symlink_to("nowhere")
    with fails_with(errno.EEXIST):
        os.open(where / "link", flags)
    (where / "directory").mkdir()
    with fails_with(errno.EEXIST):
        os.open(where / "directory", flags)


def test_creation_follows_a_dangling_symlink(where: Path) -> None:
    (where / "link").symlink_to("target")
    with opened(where / "link") as fd:
        os.write(fd, b"data")
    assert (where / "target").read_bytes() == b"data"


def test_truncation_at_open_empties_the_file(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path, os.O_WRONLY | os.O_TRUNC):
        assert path.stat().st_size == 0
    assert path.read_bytes() == b""


def test_truncation_at_open_does_not_bring_old_bytes_back(where: Path) -> None:
    path = file(where / "file", b"x" * 10_000)
    with opened(path, os.O_RDWR | os.O_TRUNC) as fd:
        os.pwrite(fd, b"end", 9_000)
    assert path.read_bytes() == bytes(9_000) + b"end"


def test_the_mode_of_a_new_file_obeys_the_umask(where: Path) -> None:
    before = os.umask(0o027)
    try:
        with opened(where / "file", os.O_CREAT | os.O_WRONLY, 0o666) as fd:
            assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
        (where / "directory").mkdir(0o777)
        assert stat.S_IMODE((where / "directory").stat().st_mode) == 0o750
    finally:
        os.umask(before)


@pytest.mark.parametrize("uid", [0, NOBODY])
@pytest.mark.parametrize("mode", [0o444, 0o000])
def test_the_creating_open_may_write_whatever_the_mode(where: Path, mode: int, uid: int) -> None:
    where.chmod(0o777)
    for flags in (os.O_EXCL, os.O_TRUNC, 0):
        with user(uid, uid):
            with opened(where / "file", os.O_CREAT | os.O_RDWR | flags, mode) as fd:
                assert os.write(fd, b"data") == 4
                os.ftruncate(fd, 2)
                assert os.pread(fd, 10, 0) == b"da"
                assert stat.S_IMODE(os.fstat(fd).st_mode) == mode
            if uid:
                with pytest.raises(PermissionError):
                    os.open(where / "file", os.O_CREAT | os.O_RDWR)
            (where / "file").unlink()


def test_a_file_that_several_make_at_once_is_made_once(where: Path) -> None:
    script = """
import os, sys
for number in range(100):
    fd = os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.write(fd, b"x")
    os.close(fd)
"""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(another_python(script, where)) for _ in range(4)]
        assert [process.wait(60) for process in processes] == [0] * 4
    assert {path.read_bytes() for path in where.iterdir()} == {b"xxxx"}
    assert len(os.listdir(where)) == 100


@pytest.mark.parametrize(
    ("name", "flags", "number"),
    [
        ("missing", os.O_RDONLY, errno.ENOENT),
        ("missing/file", os.O_WRONLY | os.O_CREAT, errno.ENOENT),
        ("file/below", os.O_WRONLY | os.O_CREAT, errno.ENOTDIR),
        ("file", os.O_RDONLY | os.O_DIRECTORY, errno.ENOTDIR),
        ("file/", os.O_RDONLY, errno.ENOTDIR),
        ("directory", os.O_WRONLY, errno.EISDIR),
        ("directory", os.O_WRONLY | os.O_CREAT, errno.EISDIR),
        ("new/", os.O_WRONLY | os.O_CREAT, errno.EISDIR),
        ("link", os.O_RDONLY | os.O_NOFOLLOW, errno.ELOOP),
        ("loop", os.O_RDONLY, errno.ELOOP),
        ("", os.O_RDONLY | os.O_CREAT, errno.EISDIR),
    ],
)
def test_what_cannot_be_opened(where: Path, name: str, flags: int, number: int) -> None:
    file(where / "file")
    (where / "directory").mkdir()
    (where / "link").symlink_to("file")
    (where / "loop").symlink_to("loop")
    with fails_with(number):
        os.open(f"{where}/{name}", flags)


def test_a_handle_does_only_what_it_was_opened_for(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path, os.O_RDONLY) as fd:
        with fails_with(errno.EBADF):
            os.write(fd, b"x")
        with fails_with(errno.EINVAL):
            os.ftruncate(fd, 0)
    with opened(path, os.O_WRONLY) as fd, fails_with(errno.EBADF):
        os.read(fd, 1)


def test_a_program_runs_from_here(where: Path) -> None:
    shutil.copy("/bin/echo", where / "echo")
    assert run(where / "echo", "hello").stdout == "hello\n"
    script = file(where / "script", b"#!/bin/sh\necho from a script\n")
    script.chmod(0o755)
    assert run(script).stdout == "from a script\n"


@pytest.mark.parametrize("bits", range(8))
def test_the_mode_determines_which_users_read_and_write(where: Path, bits: int) -> None:
    path = make("file", where / "file", 0, 1000)
    os.chown(path, 1000, 2000)
    everybody: list[tuple[int, tuple[Any, ...]]] = [
        (6, (1000, 1)),
        (3, (1, 2000)),
        (3, (1, 1, (2000, 5))),
        (0, (1, 1)),
    ]
    wanted = {os.O_RDONLY: 4, os.O_WRONLY: 2, os.O_RDWR: 6, os.O_RDONLY | os.O_TRUNC: 6}
    for shift, who in everybody:
        # All others may do everything, which must not matter.
        path.chmod(0o777 & ~(7 << shift) | bits << shift)
        with user(*who):
            for flags, needed in wanted.items():
                if bits & needed == needed:
                    os.close(os.open(path, flags))
                else:
                    with fails_with(errno.EACCES):
                        os.open(path, flags)


def _open_and_close(path: Path, flags: int) -> None:
    os.close(os.open(path, flags))


def test_opening_what_is_there_changes_no_time(where: Path) -> None:
    path = file(where / "file", b"data")
    for flags in (os.O_RDONLY, os.O_RDWR, os.O_RDWR | os.O_CREAT, os.O_WRONLY | os.O_APPEND):
        assert updated(partial(_open_and_close, path, flags), path, where) == ["", ""]
    assert path.read_bytes() == b"data"


@pytest.mark.parametrize("data", [b"", b"data"])
def test_truncation_at_open_changes_the_times(where: Path, data: bytes) -> None:
    path = file(where / "file", data)
    emptied = partial(_open_and_close, path, os.O_WRONLY | os.O_TRUNC)
    assert updated(emptied, path, where) == ["mc", ""]
    assert path.read_bytes() == b""


def test_a_creation_that_fails_changes_nothing(where: Path) -> None:
    def attempts() -> None:
        with user(), fails_with(errno.EACCES):
            os.open(where / "file", os.O_CREAT | os.O_WRONLY, 0o644)
        with fails_with(errno.EEXIST):
            os.open(where / "there", os.O_CREAT | os.O_EXCL)

    there = file(where / "there")
    assert updated(attempts, where, there) == ["", ""]


def test_a_mode_of_creation_does_not_limit_its_own_handle(where: Path) -> None:
    where.chmod(0o777)
    with user(), opened(where / "file", os.O_CREAT | os.O_RDWR, 0) as fd:
        assert os.write(fd, b"data") == 4
        assert os.pread(fd, 4, 0) == b"data"
        with fails_with(errno.EACCES):
            os.open(where / "file", os.O_RDONLY)


def test_a_handle_outlives_the_permission(where: Path) -> None:
    path = make("file", where / "file", 0o600, NOBODY)
    with user(), opened(path, os.O_RDWR) as fd:
        path.chmod(0)
        os.write(fd, b"data")
        assert os.pread(fd, 4, 0) == b"data"
        with fails_with(errno.EACCES):
            os.open(path, os.O_RDONLY)


def test_a_running_program_is_not_written_to(where: Path) -> None:
    program = where / "sleep"
    shutil.copy("/bin/sleep", program)
    process = subprocess.Popen([str(program), "60"])
    try:
        wait_until(lambda: Path(f"/proc/{process.pid}/exe").resolve() == program, "exec")
        with fails_with(errno.ETXTBSY):
            os.open(program, os.O_WRONLY)
        with fails_with(errno.ETXTBSY):
            os.truncate(program, 0)
        with opened(program, os.O_RDONLY) as fd:
            assert os.read(fd, 4) == b"\x7fELF"
    finally:
        process.kill()
        process.wait(60)
    with opened(program, os.O_RDWR), fails_with(errno.ETXTBSY):
        subprocess.run([program, "0"], timeout=60, check=True)


def test_a_path_handle_reads_and_writes_nothing(where: Path) -> None:
    path = file(where / "file", b"data")
    with opened(path, os.O_PATH) as fd:
        assert os.fstat(fd).st_size == 4
        with fails_with(errno.EBADF):
            os.read(fd, 1)
        with opened(f"/proc/self/fd/{fd}", os.O_RDONLY) as again:
            assert os.read(again, 10) == b"data"


def test_two_creators_of_one_name_and_one_wins(where: Path) -> None:
    script = """
import os, sys
won = 0
for number in range(300):
    try:
        os.close(os.open(f"{sys.argv[1]}/{number}", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
        won += 1
    except FileExistsError:
        pass
print(won)
"""
    with contextlib.ExitStack() as stack:
        processes = [stack.enter_context(another_python(script, where)) for _ in range(3)]
        assert sum(int(line_of(process)) for process in processes) == 300
