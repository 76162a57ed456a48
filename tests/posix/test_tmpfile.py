"""open(2) with ``O_TMPFILE``: files without names, and linkat(2) that gives them one."""

from __future__ import annotations

import errno
import mmap
import os
import stat
import tempfile
from pathlib import Path

import pytest

from tests.mount.support import Mount, another_python, fails_with, line_of, run, wait_until
from tests.posix.conftest import MOUNTED
from tests.posix.support import (
    AT_FDCWD,
    AT_SYMLINK_FOLLOW,
    NOBODY,
    check,
    directory,
    file,
    libc,
    opened,
    umask,
    updated,
    user,
)
from warabifs.frontends.base import Ability

pytestmark = [
    pytest.mark.parametrize("shared", ["ext4", *MOUNTED], indirect=True, scope="package"),
    pytest.mark.needs(Ability.TMPFILE),
]

MAKE = os.O_TMPFILE | os.O_RDWR


def link(fd: int, path: Path) -> None:
    """Give an open file a name, without CAP_DAC_READ_SEARCH."""
    source = os.fsencode(f"/proc/self/fd/{fd}")
    check(libc.linkat(AT_FDCWD, source, AT_FDCWD, os.fsencode(path), AT_SYMLINK_FOLLOW))


def used(path: Path) -> int:
    """How many inodes the file system has."""
    found = os.statvfs(path)
    return found.f_files - found.f_ffree


def test_a_file_without_a_name_is_a_file(where: Path) -> None:
    with opened(where, MAKE, 0o640) as fd:
        found = os.fstat(fd)
        assert (stat.S_IFMT(found.st_mode), found.st_nlink, found.st_size) == (stat.S_IFREG, 0, 0)
        assert os.listdir(where) == []
        assert os.write(fd, b"x" * 200_000) == 200_000
        os.pwrite(fd, b"data", 100_000)
        os.ftruncate(fd, 100_004)
        os.fsync(fd)
        assert os.pread(fd, 200_000, 0) == b"x" * 100_000 + b"data"
        os.setxattr(fd, "user.x", b"value")
        assert os.getxattr(fd, "user.x") == b"value"
        os.fchmod(fd, 0o604)
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o604
        with mmap.mmap(fd, 100_004) as mapping:
            mapping[0] = ord("y")
        with opened(f"/proc/self/fd/{fd}", os.O_RDONLY) as again:
            assert os.pread(again, 2, 0) == b"yx"
    assert os.listdir(where) == []


def test_it_goes_with_its_last_close(where: Path) -> None:
    before = used(where)
    with opened(where, MAKE) as fd, opened(f"/proc/self/fd/{fd}", os.O_RDWR) as again:
        os.write(fd, b"data")
        assert used(where) > before
        os.close(os.dup(fd))
        assert os.pread(again, 9, 0) == b"data"
    wait_until(lambda: used(where) <= before, "its end")


def test_it_may_get_a_name_once(where: Path) -> None:
    with opened(where, MAKE, 0o600) as fd:
        os.write(fd, b"data")
        assert updated(lambda: link(fd, where / "file"), where, fd) == ["mc", "c"]
        assert os.fstat(fd).st_nlink == 1
        assert (where / "file").read_bytes() == b"data"
        assert os.path.samestat(os.fstat(fd), (where / "file").stat())
        link(fd, where / "other")  # it has a name, and so may have more
        os.unlink(where / "file")
        os.unlink(where / "other")
        with fails_with(errno.ENOENT):
            link(fd, where / "again")
        assert os.pread(fd, 9, 0) == b"data"
    assert os.listdir(where) == []


def test_what_got_a_name_stays(where: Path, shared: Path | Mount) -> None:
    with opened(where, MAKE, 0o600) as fd:
        os.write(fd, b"data")
        file(where / "taken")
        with fails_with(errno.EEXIST):
            link(fd, where / "taken")
        link(fd, where / "file")
        with opened(where, os.O_RDONLY) as directory_fd:
            os.fsync(directory_fd)
    Path("/proc/sys/vm/drop_caches").write_text("2")
    assert (where / "file").read_bytes() == b"data"
    assert sorted(os.listdir(where)) == ["file", "taken"]
    if isinstance(shared, Mount) and shared.source.startswith("file:"):
        shared.remount()
        assert (where / "file").read_bytes() == b"data"


def test_exclusive_ones_get_no_name(where: Path) -> None:
    with opened(where, MAKE | os.O_EXCL) as fd:
        os.write(fd, b"data")
        with fails_with(errno.ENOENT):
            link(fd, where / "file")


@pytest.mark.parametrize(
    ("flags", "number"),
    [(os.O_TMPFILE | os.O_RDONLY, errno.EINVAL), (MAKE | os.O_CREAT, errno.EINVAL)],
)
def test_which_flags_are_refused(where: Path, flags: int, number: int) -> None:
    with fails_with(number):
        os.open(where, flags)
    os.close(os.open(where, MAKE))


def test_permissions_to_make_a_file_without_a_name(where: Path) -> None:
    file(where / "file")
    with fails_with(errno.ENOTDIR):
        os.open(where / "file", MAKE)
    with fails_with(errno.ENOENT):
        os.open(where / "nothing", MAKE)
    closed, free = directory(where / "closed"), directory(where / "free", 0o777)
    with user():
        with fails_with(errno.EACCES):
            os.open(closed, MAKE)
        with opened(free, MAKE) as fd:
            assert (os.fstat(fd).st_uid, os.fstat(fd).st_gid) == (NOBODY, NOBODY)
            with fails_with(errno.EACCES):
                link(fd, closed / "file")
            link(fd, free / "file")


def test_it_inherits_as_a_named_file_does(where: Path) -> None:
    group = directory(where / "group")
    os.chown(group, 0, 5)
    group.chmod(0o2777)
    with umask(0o027), opened(group, MAKE, 0o666) as fd:
        assert stat.S_IMODE(os.fstat(fd).st_mode) == 0o640
        assert os.fstat(fd).st_gid == 5
    run("setfacl", "-d", "-m", "u::rw,g::r,o::-,u:1000:rw", group)
    with (
        umask(0o077),
        opened(group, MAKE, 0o666) as fd,
        opened(group / "file", mode=0o666) as named,
    ):
        link(fd, group / "linked")
        assert os.fstat(fd).st_mode == os.fstat(named).st_mode
        acl = "system.posix_acl_access"
        assert os.getxattr(fd, acl) == os.getxattr(named, acl)


def test_tempfile_uses_it(where: Path) -> None:
    def use() -> None:
        with tempfile.TemporaryFile(dir=where) as temporary:
            temporary.write(b"data")
            temporary.seek(0)
            assert temporary.read() == b"data"

    assert updated(use, where) == [""]  # no name came and went


HOLDS = """
import os, sys, time
fd = os.open(sys.argv[1], os.O_TMPFILE | os.O_RDWR)
os.write(fd, b"x" * 100_000)
print("made", flush=True)
time.sleep(600)
"""


def test_it_goes_with_a_program_that_is_killed(where: Path) -> None:
    before = used(where)
    with another_python(HOLDS, where) as process:
        assert line_of(process) == "made"
        assert used(where) > before
        process.kill()
    wait_until(lambda: used(where) <= before, "its end")


def test_many_at_once(where: Path) -> None:
    fds = [os.open(where, MAKE) for _ in range(200)]
    try:
        for number, fd in enumerate(fds):
            os.write(fd, b"%d" % number)
        for number, fd in enumerate(fds[::2]):
            link(fd, where / str(number * 2))
    finally:
        for fd in fds:
            os.close(fd)
    assert sorted(map(int, os.listdir(where))) == list(range(0, 200, 2))
    assert all((where / str(n)).read_bytes() == b"%d" % n for n in range(0, 200, 2))
