"""Front ends: each can do what the table says and no more, and what one cannot do is refused."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import mmap
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tests.mount.idmapped import idmapped
from tests.mount.support import (
    MIB,
    PROVIDER_ID,
    ROOT,
    Mount,
    another_python,
    is_mounted,
    line_of,
    mounting,
    python,
    run,
    serving,
    wait_until,
    watchdog,
)
from tests.mount.together import client_of
from tests.posix.support import birth_ns, check, directory, file, libc, mode_of, opened, umask, user
from warabi import engine as warabi_engine
from warabifs.frontends.base import Ability
from warabifs.frontends.registry import FRONT_ENDS

LIMIT = 60.0
NEVER = 2.0
"""Seconds after which what has not ended counts as not ending, where that is what is expected."""
PROVIDER = f"provider_id={PROVIDER_ID}"
PAGE = mmap.PAGESIZE


@contextlib.contextmanager
def mounted_by(name: str, source: str, place: Path, *options: str) -> Iterator[Mount]:
    with mounting(source, place, f"frontend={name}", *options) as mount, watchdog(mount, LIMIT):
        yield mount


def resident(fd: int) -> int:
    """Pages of a file, open for reading and writing, that the page cache has."""
    size = os.fstat(fd).st_size
    with mmap.mmap(fd, size, mmap.MAP_PRIVATE) as mapping:
        place = (ctypes.c_char * size).from_buffer(mapping)
        found = (ctypes.c_ubyte * (size // PAGE))()
        check(libc.mincore(place, ctypes.c_size_t(size), found))
        del place
    return sum(page & 1 for page in found)


def ends(process: subprocess.Popen[str], name: str, ability: Ability) -> bool:
    try:
        process.wait(LIMIT if ability in FRONT_ENDS[name].abilities else NEVER)
    except subprocess.TimeoutExpired:
        return False
    return True


# Each returns whether a mount by the front end of that name has the ability.


def goes_past_the_page_cache(name: str, place: Path) -> bool:
    with (
        mounted_by(name, "memory:", place, "direct_io") as mount,
        opened(mount.path / "file") as fd,
    ):
        os.write(fd, bytes(PAGE))
        assert os.pread(fd, PAGE, 0) == bytes(PAGE)
        return resident(fd) == 0


def holds_writes_back(name: str, place: Path) -> bool:
    places = [place / "here", place / "there"]
    for one in places:
        one.mkdir()
    with (
        serving("na+sm") as provider,
        mounted_by(name, provider.address, places[0], "exclusive", PROVIDER) as here,
        mounted_by(name, provider.address, places[1], PROVIDER) as there,
        opened(here.path / "file") as fd,
    ):
        os.write(fd, b"held back")
        held = (there.path / "file").stat().st_size == 0
        os.fsync(fd)
        assert (there.path / "file").read_bytes() == b"held back"
        return held


def passes_through(name: str, place: Path) -> bool:
    with mounting("memory:", place, f"frontend={name}", "passthrough", start=False) as mount:
        done = run(*mount.command(), check=False)
        if done.returncode:
            wanted = "mount.warabifs: option passthrough: only with frontend=kernel\n"
            assert (done.returncode, done.stderr) == (1, wanted)
            assert not is_mounted(mount.path)
            return False
        mount.adopt()
        return True


STARTED = "import os, sys\nprint('now', flush=True)\n"


def opens_without_requests(name: str, place: Path) -> bool:
    with mounted_by(name, "memory:", place) as mount:
        path = file(mount.path / "file", b"text")
        assert path.read_bytes() == b"text"
        mount.signal(signal.SIGSTOP)
        try:
            with another_python(STARTED + "os.open(sys.argv[1], os.O_RDONLY)", path) as process:
                assert line_of(process) == "now"
                return ends(process, name, Ability.OPENLESS)
        finally:
            mount.signal(signal.SIGCONT)


ASKED = """
import sys
from warabifs.fs.filesystem import FileSystem
from warabifs.mount import main

getattr_ = FileSystem.getattr

async def ask(self, ino):
    print("taken", flush=True)
    return await getattr_(self, ino)

FileSystem.getattr = ask
main.main(["--foreground", *sys.argv[1:]])
"""


def kills_who_waits(name: str, place: Path) -> bool:
    (path := place / "mnt").mkdir()
    options = f"frontend={name},{PROVIDER},log={place}/log"
    with (
        serving("na+sm") as provider,
        another_python(ASKED, provider.address, path, "-o", options) as mount,
    ):
        try:
            wait_until(lambda: is_mounted(path), "it is mounted")
            provider.process.send_signal(signal.SIGSTOP)
            with another_python("import os, sys; os.stat(sys.argv[1])", path) as process:
                try:
                    assert line_of(mount) == "taken"
                    process.kill()
                    return ends(process, name, Ability.INTERRUPT)
                finally:
                    provider.process.send_signal(signal.SIGCONT)
        finally:
            run("fusermount3", "-u", "-z", path)
            mount.wait(LIMIT)


def leaves_the_umask_to_us(name: str, place: Path) -> bool:
    with mounted_by(name, "memory:", place) as mount:
        run("setfacl", "-d", "-m", "u::rwx,g::rwx,o::-", mount.path)
        with umask(0o077):
            return mode_of(file(mount.path / "file")) == 0o660


WATCHED = """
import sys
from warabifs.fs.filesystem import FileSystem
from warabifs.mount import main

read, is_incapable, getxattr = FileSystem.read, FileSystem.is_incapable, FileSystem.getxattr
readlink, readdir = FileSystem.readlink, FileSystem.readdir

def looked(self, ino):
    print("asked for capabilities", flush=True)
    return is_incapable(self, ino)

async def bring(self, ino, handle, offset, size, thread=0):
    print("read by", thread, flush=True)
    return await read(self, ino, handle, offset, size, thread)

async def look(self, ino, name):
    print("asked for", name.decode(), flush=True)
    return await getxattr(self, ino, name)

async def follow(self, ino):
    print("asked for a link", flush=True)
    return await readlink(self, ino)

async def list(self, handle, cookie, most):
    print("asked for a listing", flush=True)
    return await readdir(self, handle, cookie, most)

FileSystem.read, FileSystem.is_incapable, FileSystem.getxattr = bring, looked, look
FileSystem.readlink, FileSystem.readdir = follow, list
main.main(["--foreground", *sys.argv[1:]])
"""


OPENED = "import os, sys\nfd = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
WRITES = OPENED + "for _ in range(3): os.pwrite(fd, b'text', 0)\n"
READS = WRITES + "assert os.pread(fd, 9, 0) == b'text'\n"
LINKS = """
import os, sys
os.symlink("x" * 4095, sys.argv[1])
for _ in range(5):
    assert os.readlink(sys.argv[1]) == "x" * 4095
"""
LISTS = """
import os, sys
os.mkdir(sys.argv[1])
for number in range(100):
    open(f"{sys.argv[1]}/{number}", "w").close()
for _ in range(%d):
    assert len(os.listdir(sys.argv[1])) == 100
"""
SETS = (
    OPENED
    + """
os.setxattr(fd, "user.x", b"1", os.XATTR_CREATE)
os.setxattr(fd, "user.x", b"2", os.XATTR_REPLACE)
"""
)
COPIES = WRITES + "assert os.copy_file_range(fd, fd, 4, 0, 4) == 4\n"


def requests_of(name: str, place: Path, script: str, *options: str) -> list[str]:
    """What a mount is asked for while a program runs *script*."""
    (path := place / "mnt").mkdir()
    words = ",".join((f"frontend={name}", f"log={place}/log", *options))
    with another_python(WATCHED, "memory:", path, "-o", words) as process:
        try:
            wait_until(lambda: is_mounted(path), "it is mounted")
            python(script, path / "file")
        finally:
            run("fusermount3", "-u", "-z", path)
        said, _ = process.communicate(timeout=LIMIT)
        assert process.returncode == 0
    return said.splitlines()


def says_whose_writes_kill_set_ids(name: str, place: Path) -> bool:
    return requests_of(name, place, WRITES).count("asked for capabilities") < 3


def says_who_reads(name: str, place: Path) -> bool:
    requests = requests_of(name, place, READS, "direct_io")
    lines = [line for line in requests if line.startswith("read by")]
    assert len(lines) == 1
    return lines != ["read by 0"]


def has_ranges_copied(name: str, place: Path) -> bool:
    requests = requests_of(name, place, COPIES, "direct_io")
    return not any(line.startswith("read by") for line in requests)


def keeps_links(name: str, place: Path) -> bool:
    asked = requests_of(name, place, LINKS).count("asked for a link")
    assert asked in (1, 5)
    return asked == 1


def keeps_listings(name: str, place: Path) -> bool:
    """Whether no directory is read for a second listing."""
    asked = [
        requests_of(name, directory(place / f"{times}"), LISTS % times).count("asked for a listing")
        for times in (1, 3)
    ]
    assert asked[1] in (asked[0], 3 * asked[0])
    return asked[1] == asked[0]


def makes_idmapped_mounts(name: str, place: Path) -> bool:
    with mounted_by(name, "memory:", place) as mount:
        try:
            with idmapped(mount.path, place / "mapped", (0, 100_000, 1000)):
                return True
        except OSError as error:
            return error.errno != errno.EINVAL


def creates_attributes_at_once(name: str, place: Path) -> bool:
    return "asked for user.x" not in requests_of(name, place, SETS)


def knows_when_files_are_made(name: str, place: Path) -> bool:
    with mounted_by(name, "memory:", place) as mount:
        return birth_ns(file(mount.path / "file")) is not None


def has_flags(name: str, place: Path) -> bool:
    with mounted_by(name, "memory:", place) as mount:
        return run("lsattr", file(mount.path / "file"), check=False).returncode == 0


def makes_files_without_names(name: str, place: Path) -> bool:
    with mounted_by(name, "memory:", place) as mount:
        fd: int = libc.open(os.fsencode(mount.path), os.O_TMPFILE | os.O_RDWR, 0o600)
        if fd >= 0:
            os.close(fd)
            return True
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        return False


def drops_some_pages(name: str, place: Path) -> bool:
    """Whether a write past the page cache leaves pages that it did not make false."""
    with (
        mounted_by(name, "memory:", place) as mount,
        opened(mount.path / "file") as fd,
        opened(mount.path / "file", os.O_WRONLY | os.O_DIRECT) as direct,
    ):
        os.write(fd, bytes(4 * MIB))
        assert os.pread(fd, 4 * MIB, 0) == bytes(4 * MIB)
        assert resident(fd) == 4 * MIB // PAGE
        with mmap.mmap(-1, PAGE) as page:
            assert os.pwrite(direct, page, 0) == PAGE
        left = resident(fd)
        assert left < 4 * MIB // PAGE
        return left > 0


def maps_what_bypasses_the_page_cache(name: str, place: Path) -> bool:
    with (
        serving("na+sm") as provider,
        mounted_by(name, provider.address, place, PROVIDER) as mount,
        opened(mount.path / "file", os.O_RDWR | os.O_CREAT | os.O_APPEND) as fd,
    ):
        os.write(fd, bytes(PAGE))
        appended = is_mappable(fd)
    with (
        mounted_by(name, "memory:", place, "direct_io") as mount,
        opened(mount.path / "file") as fd,
    ):
        os.write(fd, bytes(PAGE))
        assert is_mappable(fd) == appended
    return appended


def is_mappable(fd: int) -> bool:
    """Whether a file of ``PAGE`` bytes can be mapped shared."""
    try:
        mmap.mmap(fd, PAGE).close()
    except OSError as error:
        return error.errno != errno.ENODEV
    return True


def keeps_pages(name: str, place: Path) -> bool:
    with (
        serving("tcp") as provider,
        mounted_by(name, provider.address, place, PROVIDER) as mount,
        opened(mount.path / "file") as fd,
    ):
        os.write(fd, bytes(16 * PAGE))
        os.fstat(fd)  # the times are others than before
        return resident(fd) == 16


def reserves_room(name: str, place: Path) -> bool:
    """fallocate(2); without it, posix_fallocate(3) writes zeros."""
    with mounted_by(name, "memory:", place) as mount, opened(mount.path / "file") as fd:
        os.posix_fallocate(fd, 0, PAGE)
        assert os.fstat(fd).st_size == PAGE
        if libc.fallocate(fd, 1, ctypes.c_int64(0), ctypes.c_int64(2 * PAGE)) == 0:
            return True
        assert ctypes.get_errno() == errno.EOPNOTSUPP
        return False


def finds_holes(name: str, place: Path) -> bool:
    """Without it, holes are data, and the only hole is the end."""
    with (
        mounted_by(name, f"file:{place}/target", place) as mount,
        opened(mount.path / "file") as fd,
    ):
        os.ftruncate(fd, MIB)
        os.pwrite(fd, bytes(PAGE), MIB - PAGE)
        assert os.lseek(fd, MIB - PAGE, os.SEEK_HOLE) == MIB
        return os.lseek(fd, 0, os.SEEK_HOLE) == 0


def has_locks_kept(name: str, place: Path) -> bool:
    """By the provider; without it, mounts do not see each other's."""
    with (
        serving("na+sm") as provider,
        mounted_by(name, provider.address, place, PROVIDER) as mount,
        warabi_engine.Engine("na+sm", warabi_engine.client) as engine,
        opened(mount.path / "file") as fd,
    ):
        fcntl.flock(fd, fcntl.LOCK_EX)
        target = client_of(provider, engine)
        found = target.test_lock(target.open_name("file"), flock=True)
        return found is not None


CHECKS: dict[Ability, Callable[[str, Path], bool]] = {
    Ability.DIRECT_IO: goes_past_the_page_cache,
    Ability.WRITEBACK: holds_writes_back,
    Ability.PASSTHROUGH: passes_through,
    Ability.OPENLESS: opens_without_requests,
    Ability.INTERRUPT: kills_who_waits,
    Ability.UMASK: leaves_the_umask_to_us,
    Ability.KILL_SETID: says_whose_writes_kill_set_ids,
    Ability.FORGET_RANGE: drops_some_pages,
    Ability.DIRECT_MMAP: maps_what_bypasses_the_page_cache,
    Ability.KEEP_PAGES: keeps_pages,
    Ability.REQUEST_FLAGS: says_who_reads,
    Ability.FALLOCATE: reserves_room,
    Ability.SEEK_DATA: finds_holes,
    Ability.LOCKS: has_locks_kept,
    Ability.COPY_RANGE: has_ranges_copied,
    Ability.TMPFILE: makes_files_without_names,
    Ability.CACHE_SYMLINKS: keeps_links,
    Ability.CACHE_LISTINGS: keeps_listings,
    Ability.IDMAP: makes_idmapped_mounts,
    Ability.BIRTH_TIME: knows_when_files_are_made,
    Ability.INODE_FLAGS: has_flags,
    Ability.XATTR_FLAGS: creates_attributes_at_once,
}


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("ability", Ability)
def test_a_front_end_has_the_abilities_of_the_table(
    name: str, ability: Ability, place: Path
) -> None:
    assert CHECKS[ability](name, place) == (ability in FRONT_ENDS[name].abilities)


def test_the_documents_name_what_is_not_supported() -> None:
    text = (ROOT / "docs/mount-options.md").read_text()
    table = text.partition("What pyfuse3 does not support:")[2].partition("How fast")[0]
    named = re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)
    assert set(named) == set(Ability) - FRONT_ENDS["pyfuse3"].abilities


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("flags", [0, os.O_APPEND, os.O_DIRECT])
@pytest.mark.parametrize("option", ["rw", "direct_io"])
def test_whatever_way_a_file_is_written_it_loses_its_set_id_bits(
    name: str, place: Path, flags: int, option: str
) -> None:
    with (
        serving("na+sm") as provider,
        mounted_by(name, provider.address, place, PROVIDER, option) as mount,
        mmap.mmap(-1, PAGE) as page,
    ):
        path = file(mount.path / "file")
        for uid, left in ((0, 0o6777), (1000, 0o777)):
            path.chmod(0o6777)
            with user(uid), opened(path, os.O_WRONLY | flags) as fd:
                assert os.write(fd, page) == PAGE
            assert mode_of(path) == left


@pytest.mark.parametrize("name", FRONT_ENDS)
@pytest.mark.parametrize("flags", [os.O_APPEND, os.O_APPEND | os.O_DIRECT], ids=["", "direct"])
def test_what_a_mapping_changed_is_not_appended(name: str, place: Path, flags: int) -> None:
    """Though the kernel may write it back by the opening that appends."""
    with (
        serving("na+sm") as provider,
        mounted_by(name, provider.address, place, PROVIDER) as mount,
    ):
        path = file(mount.path / "file", b"x" * 3 * PAGE)
        with (
            opened(path) as fd,
            opened(path, os.O_WRONLY | flags) as appends,
            mmap.mmap(fd, 2 * PAGE) as mapping,
            mmap.mmap(-1, 512) as more,
        ):
            more[:] = b"more" * 128
            for number in range(20):
                mapping[number] = mapping[PAGE + number] = ord("y")
                os.write(appends, more)
                mapping.flush()
        wanted = bytearray(b"x" * 3 * PAGE + b"more" * 128 * 20)
        wanted[:20] = wanted[PAGE : PAGE + 20] = b"y" * 20
        assert path.read_bytes() == wanted


FAILS_ONCE = """
import errno, sys
from warabifs.fs.filesystem import FileSystem
from warabifs.mount import main

readdir = FileSystem.readdir
failed = []

async def fail_once(self, handle, cookie, most):
    if cookie and not failed:
        failed.append(cookie)
        raise OSError(errno.EIO, "the target fails once")
    return await readdir(self, handle, cookie, min(most, 5))

FileSystem.readdir = fail_once
main.main(["--foreground", *sys.argv[1:]])
assert failed
"""


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_entries_found_before_an_error_are_listed(name: str, place: Path) -> None:
    """Their lookups are counted, and the kernel forgets only what it was told of."""
    (path := place / "mnt").mkdir()
    options = f"frontend={name},log={place}/log"
    with another_python(FAILS_ONCE, "memory:", path, "-o", options) as process:
        try:
            wait_until(lambda: is_mounted(path), "it is mounted")
            wanted = [file(path / str(number)).name for number in range(20)]
            assert sorted(os.listdir(path)) == sorted(wanted)
        finally:
            run("fusermount3", "-u", "-z", path)
        assert process.wait(LIMIT) == 0


@pytest.mark.parametrize("name", FRONT_ENDS)
def test_mounts_are_listed_alike(name: str, place: Path) -> None:
    with mounted_by(name, "memory:", place, "noatime", "fsname=some name") as mount:
        found = run("findmnt", "-n", "-r", "-o", "FSTYPE,SOURCE,OPTIONS", mount.path).stdout
        assert found == (
            "fuse.warabifs some\\x20name rw,nosuid,nodev,noatime,user_id=0,group_id=0,"
            "default_permissions,allow_other\n"
        )


TWO_IN_A_PROCESS = """
import sys
from warabifs.frontends.pyfuse3.frontend import Pyfuse3FrontEnd as FrontEnd
from warabifs.mount import main
begin = FrontEnd.begin
def begin_two(self, files, settings):
    abilities = begin(self, files, settings)
    try:
        begin(FrontEnd(self._device), files, settings)
    except ValueError as error:
        print(error, flush=True)
    return abilities
FrontEnd.begin = begin_two
main.main(["--foreground", *sys.argv[1:]])
"""


def test_a_second_mount_of_a_process_by_pyfuse3_is_refused(place: Path) -> None:
    """The first one goes on."""
    (path := place / "mnt").mkdir()
    options = ("memory:", path, "-o", "frontend=pyfuse3")
    with another_python(TWO_IN_A_PROCESS, *options) as process:
        try:
            assert "one mount at a time in a process" in line_of(process)
            wait_until(lambda: is_mounted(path), "it is mounted")
            assert os.listdir(path) == []
        finally:
            run("fusermount3", "-u", "-z", path)
        assert process.wait(LIMIT) == 0


def test_a_front_end_that_is_unknown_is_refused(place: Path) -> None:
    with mounting("memory:", place, "frontend=libfuse", start=False) as mount:
        done = run(*mount.command(), check=False)
    assert (done.returncode, done.stderr) == (
        1, "mount.warabifs: option frontend=libfuse: expected kernel or pyfuse3\n",
    )  # fmt: skip


WITHOUT = """
import sys
sys.modules["pyfuse3"] = None
from warabifs.mount import main
main.main(sys.argv[1:])
"""


def test_a_front_end_that_is_not_installed_is_refused(place: Path) -> None:
    (path := place / "mnt").mkdir()
    options: list[str | Path] = ["memory:", path, "-o", "frontend=pyfuse3"]
    done = run(sys.executable, "-c", WITHOUT, *options, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "pip install 'warabifs[pyfuse3]'" in done.stderr
    assert not is_mounted(path)
