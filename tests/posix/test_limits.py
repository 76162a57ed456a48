"""What docs/posix.md says that a mount cannot do, or does otherwise, as programs see it."""

from __future__ import annotations

import array
import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import select
import shutil
import stat
import struct
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.conftest import limit_of
from tests.mount.support import (
    BACKENDS,
    Mount,
    another_python,
    fails_with,
    line_of,
    mounting,
    python,
    run,
    source_of,
    wait_until,
    watchdog,
)
from tests.posix.conftest import MOUNTED
from tests.posix.support import NOBODY, check, file, libc, mode_of, opened, tick, user
from warabifs.frontends.base import Ability

on_mounts = pytest.mark.parametrize("shared", MOUNTED, indirect=True, scope="package")

FS_IOC_GETVERSION, FICLONE, FS_IOC_FIEMAP = 0x80087601, 0x40049409, 0xC020660B


@on_mounts
def test_ranges_are_not_collapsed_or_inserted(where: Path) -> None:
    with opened(where / "file") as fd:
        os.ftruncate(fd, 16_384)
        for mode in (8, 0x20, 0x40):
            with fails_with(errno.EOPNOTSUPP):
                check(libc.fallocate(fd, mode, ctypes.c_int64(0), ctypes.c_int64(4096)))


@pytest.mark.parametrize("shared", ["memory"], indirect=True, scope="package")
def test_holes_of_small_files_in_memory_are_data(where: Path) -> None:
    with opened(where / "file") as fd:
        os.ftruncate(fd, 60_000)
        assert os.lseek(fd, 10, os.SEEK_DATA) == 10
        assert os.lseek(fd, 10, os.SEEK_HOLE) == 60_000
        assert os.fstat(fd).st_blocks == -(-60_000 // 512)


@on_mounts
def test_extents_and_other_ioctls_are_not_known(where: Path) -> None:
    with opened(where / "file") as fd, opened(where / "other") as other:
        os.write(fd, b"data")
        with fails_with(errno.ENOTTY):
            fcntl.ioctl(fd, FS_IOC_GETVERSION, array.array("l", [0]))
        with fails_with(errno.EOPNOTSUPP):
            fcntl.ioctl(fd, FS_IOC_FIEMAP, bytearray(64))
        with fails_with(errno.EOPNOTSUPP):
            fcntl.ioctl(other, FICLONE, fd)
    run("cp", "--reflink=auto", where / "file", where / "copy")
    assert (where / "copy").read_bytes() == b"data"


@pytest.mark.parametrize("shared", BACKENDS, indirect=True, scope="package")
def test_an_immutable_file_is_opened_to_write_where_that_is_no_request(where: Path) -> None:
    path = file(where / "file", b"data")
    run("chattr", "+i", path)
    with opened(path, os.O_WRONLY) as fd, fails_with(errno.EPERM):
        os.write(fd, b"x")
    run("chattr", "-i", path)


@on_mounts
@pytest.mark.needs(Ability.INODE_FLAGS)
def test_the_time_of_an_append_only_file_is_set(where: Path, passed: bool) -> None:
    path = file(where / "file", b"data")
    if not passed:
        run("chattr", "+a", path)
    os.utime(path, ns=(1, 2))
    assert path.stat().st_mtime_ns == 2
    run("chattr", "-a", path)


@on_mounts
def test_reading_does_not_change_the_access_time(where: Path) -> None:
    path = file(where / "file", b"data")
    os.utime(path, ns=(1, 2))
    tick()
    path.read_bytes()
    os.listdir(where)
    assert path.stat().st_atime_ns == 1


@on_mounts
def test_df_takes_a_mount_for_a_remote_one(where: Path) -> None:
    assert run("df", "--output=target", where).stdout.split()[-1] == str(where.parent)
    done = run("df", "-l", where, check=False)
    assert (done.returncode, "no file systems processed" in done.stderr) == (1, True)


CLOCK_REALTIME_COARSE = 5


@pytest.mark.parametrize("option", ["exclusive", "frontend=pyfuse3"])
def test_now_is_at_most_one_tick_ago(place: Path, option: str) -> None:
    """With these options the kernel's coarse clock determines it."""
    with mounting("memory:", place, option) as mount:
        path = file(mount.path / "file")
        for _ in range(10):
            before = time.clock_gettime_ns(CLOCK_REALTIME_COARSE)
            os.utime(path)
            assert before <= path.stat().st_mtime_ns <= time.time_ns()


@on_mounts
def test_a_file_can_be_polled_and_is_always_ready(where: Path) -> None:
    with opened(where / "file") as fd, select.epoll() as poll:
        poll.register(fd, select.EPOLLIN | select.EPOLLOUT)
        assert poll.poll(60) == [(fd, select.EPOLLIN | select.EPOLLOUT)]


@on_mounts
@pytest.mark.parametrize("offset", [(1 << 63) - 2, 1 << 62, 1 << 55])
def test_offsets_beyond_the_limit_of_the_file_system_below_are_refused(
    where: Path, offset: int
) -> None:
    with opened(where / "file") as fd:
        try:
            os.pwrite(fd, b"x", offset)
        except OSError as error:
            assert error.errno in (errno.EFBIG, errno.ENOSPC)  # noqa: PT017
            assert os.fstat(fd).st_size == 0
        else:
            assert os.fstat(fd).st_size == offset + 1
        with fails_with(errno.EFBIG, errno.EINVAL):
            os.pwrite(fd, b"xx", (1 << 63) - 1)


@on_mounts
def test_set_id_programs_and_devices_are_inert_unless_asked_for(where: Path) -> None:
    os.mknod(where / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
    with fails_with(errno.EACCES):
        os.open(where / "null", os.O_RDWR)
    shutil.copy("/usr/bin/id", where / "id")
    (where / "id").chmod(0o4755)
    done = run("setpriv", "--reuid=1", "--regid=1", "--clear-groups", where / "id", "-u")
    assert done.stdout == "1\n"


def test_set_id_programs_and_devices_work_with_suid_and_dev(place: Path) -> None:
    with mounting("memory:", place, "suid", "dev") as mount:
        os.mknod(mount.path / "null", 0o666 | stat.S_IFCHR, os.makedev(1, 3))
        with opened(mount.path / "null", os.O_RDWR) as fd:
            assert os.write(fd, b"gone") == 4
        shutil.copy("/usr/bin/id", mount.path / "id")
        (mount.path / "id").chmod(0o4755)
        who = ("setpriv", "--reuid=1", "--regid=1", "--clear-groups")
        assert run(*who, mount.path / "id", "-u").stdout == "0\n"


@on_mounts
def test_a_set_group_id_bit_that_means_nothing_stays(where: Path) -> None:
    path = file(where / "file")
    os.chown(path, 1000, 5)
    path.chmod(0o2744)
    with user(1000, 1):
        path.write_bytes(b"data")
    assert mode_of(path) == 0o2744


@on_mounts
def test_watchers_see_what_this_mount_does(where: Path) -> None:
    script = """
import ctypes, os, struct, sys
libc = ctypes.CDLL(None, use_errno=True)
fd = libc.inotify_init1(0)
assert libc.inotify_add_watch(fd, os.fsencode(sys.argv[1]), 0xFFF) > 0
print("watching", flush=True)
while True:
    data = os.read(fd, 65536)
    while data:
        _, mask, _, size = struct.unpack_from("iIII", data)
        name = data[16 : 16 + size].rstrip(bytes(1)).decode()
        print(hex(mask & 0xFFF), name, flush=True)
        if name == "end":
            sys.exit()
        data = data[16 + size :]
"""
    with another_python(script, where) as watcher:
        assert line_of(watcher) == "watching"
        file(where / "file", b"data")
        os.rename(where / "file", where / "renamed")
        (where / "renamed").unlink()
        (where / "end").mkdir()
        seen: list[str] = []
        while not seen or not seen[-1].endswith(" end"):
            seen.append(line_of(watcher))
    wanted = ["0x100 file", "0x2 file", "0x8 file", "0x40 file", "0x80 renamed", "0x200 renamed"]
    assert [line for line in seen if line in wanted] == wanted
    assert re.fullmatch("0x100 end", seen[-1])


def test_the_holder_of_a_lock_on_another_mount_is_not_told(place: Path) -> None:
    with two_mounts(place) as (one, two):
        file(one.path / "file")
        with opened(one.path / "file") as here, opened(two.path / "file") as there:
            fcntl.lockf(here, fcntl.LOCK_EX, 10, 5)
            asked = struct.pack("hhqqi4x", fcntl.F_RDLCK, os.SEEK_SET, 0, 0, 0)
            found = struct.unpack("hhqqi4x", fcntl.fcntl(there, fcntl.F_GETLK, asked))
            assert found == (fcntl.F_WRLCK, os.SEEK_SET, 5, 10, 0)


def test_cycles_of_locks_of_open_files_are_deadlocks(place: Path) -> None:
    script = """
import fcntl, os, struct, sys
fd = os.open(sys.argv[1], os.O_RDWR)
lock = lambda start: struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, start, 1, 0)
fcntl.fcntl(fd, 37, lock(1))
print("locked", flush=True)
fcntl.fcntl(fd, 38, lock(0))
"""
    with two_mounts(place) as (one, two):
        file(one.path / "file")
        with opened(one.path / "file") as fd:
            lock = [struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, start, 1, 0) for start in (0, 1)]
            fcntl.fcntl(fd, F_OFD_SETLK, lock[0])
            with another_python(script, two.path / "file") as other:
                assert line_of(other) == "locked"
                wait_until(lambda: _waits_for_lock(other.pid), "a request that waits")
                assert not (two.path / "missing").exists()  # a later request to the provider
                with fails_with(errno.EDEADLK):
                    fcntl.fcntl(fd, F_OFD_SETLKW, lock[1])


F_OFD_SETLK, F_OFD_SETLKW = 37, 38


def _waits_for_lock(pid: int) -> bool:
    return "fuse_setlk" in Path(f"/proc/{pid}/stack").read_text()


def test_watchers_of_two_mounts_do_not_meet(place: Path) -> None:
    with two_mounts(place) as (one, two):
        watch = libc.inotify_init1(os.O_NONBLOCK)
        try:
            check(libc.inotify_add_watch(watch, os.fsencode(two.path), 0xFFF))
            file(one.path / "new")
            with fails_with(errno.EAGAIN):
                os.read(watch, 4096)
        finally:
            os.close(watch)
        assert (two.path / "new").exists()


RWF_APPEND, RWF_NOAPPEND = 0x10, 0x20


def test_rwf_append_is_not_passed_to_the_mount(place: Path) -> None:
    """Unlike ``O_APPEND`` of an open file: such a write goes where this mount last saw the end."""
    with two_mounts(place) as (one, two):
        file(one.path / "file")
        with opened(one.path / "file") as here, opened(two.path / "file") as there:
            for text in (b"here 1\n", b"here 2\n"):
                assert os.pwritev(here, [text], 0, RWF_APPEND) == 7
            assert os.pread(here, 100, 0) == b"here 1\nhere 2\n"
            assert os.pwritev(there, [b"there 1\n"], 0, RWF_APPEND) == 8
            assert os.pread(there, 100, 0) == b"there 1\nere 2\n"


def test_rwf_noappend_is_not_passed_to_the_mount(place: Path) -> None:
    with two_mounts(place) as (one, _):
        path = file(one.path / "file", b"begin\n")
        with opened(path, os.O_RDWR | os.O_APPEND) as fd:
            try:
                assert os.pwritev(fd, [b"BEGIN\n"], 0, RWF_NOAPPEND) == 6
            except OSError as error:
                assert error.errno == errno.EOPNOTSUPP  # before Linux 6.9  # noqa: PT017
            else:
                assert path.read_bytes() == b"begin\nBEGIN\n"


def test_the_position_after_an_append_is_the_one_that_the_mount_assumed(place: Path) -> None:
    with two_mounts(place) as (one, two):
        file(one.path / "file")
        flags = os.O_RDWR | os.O_APPEND
        with opened(one.path / "file", flags) as here, opened(two.path / "file", flags) as there:
            os.write(here, b"12345")
            os.write(there, b"678")
            assert os.pread(there, 100, 0) == b"12345678"
            assert os.lseek(there, 0, os.SEEK_CUR) == 3
            assert os.lseek(there, 0, os.SEEK_END) == 8


@contextlib.contextmanager
def two_mounts(place: Path) -> Iterator[tuple[Mount, Mount]]:
    """Two mounts of one provider."""
    places = [place / name for name in ("one", "two")]
    for path in places:
        path.mkdir()
    with (
        source_of("engine", place) as (source, options),
        mounting(source, places[0], *options) as one,
        mounting(source, places[1], *options) as two,
    ):
        yield one, two


@pytest.fixture
def direct(request: pytest.FixtureRequest, place: Path) -> Iterator[Mount]:
    """A mount that bypasses the page cache."""
    with mounting("memory:", place, "direct_io") as mount, watchdog(mount, limit_of(request)):
        yield mount


def test_direct_io_does_all_that_the_page_cache_does(direct: Mount) -> None:
    path = direct.path / "file"
    data = os.urandom(3_000_001)
    path.write_bytes(data)
    assert path.read_bytes() == data
    with open(path, "r+b", buffering=0) as file:
        with mmap.mmap(file.fileno(), 4096) as mapping:
            assert mapping[:] == data[:4096]
            mapping[10:14] = b"full"
            assert os.pread(file.fileno(), 20, 0) == data[:10] + b"full" + data[14:20]
            assert os.pwrite(file.fileno(), data[10:14], 10) == 4
            assert mapping[:] == data[:4096]
        with mmap.mmap(file.fileno(), 4096, mmap.MAP_PRIVATE) as mapping:
            assert mapping[:] == data[:4096]
        assert os.pwrite(file.fileno(), b"odd", 12_345) == 3
        file.truncate(12_350)
    with open(path, "ab", buffering=0) as file:
        file.write(b"end")
    assert path.read_bytes() == data[:12_345] + b"odd" + data[12_348:12_350] + b"end"
    shutil.copy(path, direct.path / "copy")
    run("cmp", path, direct.path / "copy")


@on_mounts
@pytest.mark.parametrize("mode", [0o644, 0o755, 0o400, 0o777])
def test_cp_keeps_the_mode_which_it_sets_by_an_access_control_list(where: Path, mode: int) -> None:
    original = file(where / "original", b"data")
    original.chmod(mode)
    run("cp", "-a", original, where / "copy")
    assert (where / "copy").stat().st_mode == original.stat().st_mode


AS_NOBODY = ("setpriv", f"--reuid={NOBODY}", f"--regid={NOBODY}", "--clear-groups")
UNPRIVILEGED = f"""
import os, sys
import encodings.ascii, trio, warabifs.mount.main  # before the rights to read them are given up
os.setgroups([])
os.setresgid({NOBODY}, {NOBODY}, {NOBODY})
os.setresuid({NOBODY}, {NOBODY}, {NOBODY})
warabifs.mount.main.main(sys.argv[1:])
"""


@pytest.fixture
def fuse_for_all(machine: None) -> Iterator[None]:
    """``/dev/fuse`` as udev makes it, also where it is root's alone."""
    mode = stat.S_IMODE(os.stat("/dev/fuse").st_mode)
    os.chmod("/dev/fuse", 0o666)
    yield
    os.chmod("/dev/fuse", mode)


def test_where_fusermount3_mounts_a_default_list_comes_before_the_umask(
    place: Path, fuse_for_all: None
) -> None:
    path = place / "mnt"
    with mounting("memory:", place, start=False) as mount:
        os.chown(path, NOBODY, NOBODY)
        python(UNPRIVILEGED, "memory:", path)
        mount.adopt()
        script = """
umask 022
cd "$1"
mkdir shared
setfacl -d -m u::rwx,g::rwx,u:5:rwx,o::- shared
touch shared/file
getfacl -cpnE shared/file
"""
        done = run(*AS_NOBODY, "sh", "-ec", script, "sh", path)
        assert done.stdout.split() == [
            "user::rw-", "user:5:rwx", "group::rwx", "mask::rw-", "other::---",
        ]  # fmt: skip
        with fails_with(errno.EACCES):
            os.listdir(path)  # nobody but the owner may look
