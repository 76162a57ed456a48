"""What the kernel may lack: mounts do without each feature what programs see with it."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import json
import mmap
import os
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.mount.support import (
    PROVIDER_ID,
    another_python,
    fails_with,
    is_mounted,
    mounting,
    run,
    serving,
    wait_until,
    watchdog,
)
from tests.posix.support import file, mode_of, opened, user
from tests.support.helpers import pattern
from warabifs.frontends.kernel.protocol import Feature

LIMIT = 60.0
MASKED = """
import sys
from warabifs.frontends.kernel import protocol
from warabifs.mount import main

agree = protocol.init_answer
protocol.init_answer = lambda body, wanted: agree(body, wanted & ~int(sys.argv[1]))
main.main(["--foreground", *sys.argv[2:]])
"""


@contextlib.contextmanager
def mounted_without(features: int, place: Path, source: str, *options: str) -> Iterator[Path]:
    """A mount whose kernel has none of *features*."""
    (path := place / "mnt").mkdir()
    words = ",".join((f"log={place}/log", *options))
    with another_python(MASKED, str(features), source, path, "-o", words) as process:
        try:
            wait_until(lambda: is_mounted(path), "it is mounted")
            yield path
        finally:
            run("fusermount3", "-u", "-z", path)
        assert process.wait(LIMIT) == 0


@pytest.mark.parametrize("features", [0, Feature.SETXATTR_EXT])
@pytest.mark.parametrize(("gid", "kept"), [(5, True), (1, False)])
def test_a_list_of_one_outside_the_group_takes_its_bit_away(
    features: int, gid: int, kept: bool, place: Path
) -> None:
    entries = (1, 7, 0), (2, 6, 5), (4, 5, 0), (16, 7, 0), (32, 5, 0)
    value = struct.pack("<I", 2) + b"".join(struct.pack("<HHI", *entry) for entry in entries)
    with mounted_without(features, place, "memory:") as mount:
        path = file(mount / "file")
        os.chown(path, 1000, 5)
        path.chmod(0o2755)
        with user(1000, gid):
            os.setxattr(path, "system.posix_acl_access", value)
        assert mode_of(path) == (0o2775 if kept else 0o775)
        os.setxattr(path, "user.x", b"1", os.XATTR_CREATE)
        assert os.getxattr(path, "user.x") == b"1"


@pytest.mark.parametrize("features", [0, Feature.DIRECT_IO_ALLOW_MMAP])
def test_shared_mappings_past_the_page_cache(features: int, place: Path) -> None:
    """They show what programs of another mount write, or cannot be made."""
    provider_id = f"provider_id={PROVIDER_ID}"
    (other := place / "other").mkdir()
    with (
        serving("na+sm") as provider,
        mounting(provider.address, other, provider_id, "direct_io") as there,
        watchdog(there, LIMIT),
        mounted_without(features, place, provider.address, provider_id, "direct_io") as here,
        open(file(here / "file", bytes(2 * mmap.PAGESIZE)), "r+b", buffering=0) as one,
        open(there.path / "file", "r+b", buffering=0) as two,
    ):
        if features:
            with fails_with(errno.ENODEV):
                mmap.mmap(one.fileno(), 0)
            return
        with mmap.mmap(one.fileno(), 0) as mapped:
            for number in range(20):
                os.pwrite(two.fileno(), b"%08d" % number, 8 * number)
                wait_until(
                    lambda n=number: mapped[8 * n : 8 * n + 8] == b"%08d" % n,  # type: ignore[misc]
                    "the other's bytes",
                )
                mapped[mmap.PAGESIZE + number] = number + 1
                mapped.flush()
                assert os.pread(two.fileno(), 1, mmap.PAGESIZE + number) == bytes([number + 1])


@pytest.mark.parametrize("features", [0, Feature.CACHE_SYMLINKS])
def test_a_link_that_another_mount_makes_anew_is_seen(features: int, place: Path) -> None:
    provider_id = f"provider_id={PROVIDER_ID}"
    (other := place / "other").mkdir()
    with (
        serving("na+sm") as provider,
        mounting(provider.address, other, provider_id) as there,
        watchdog(there, LIMIT),
        mounted_without(features, place, provider.address, provider_id) as here,
    ):
        for number in range(20):
            os.symlink(f"target {number}", there.path / "new")
            os.rename(there.path / "new", there.path / "link")
            for _ in range(2):
                assert os.readlink(here / "link") == f"target {number}"


@contextlib.contextmanager
def requests_of(pages: int) -> Iterator[None]:
    """Mounts that start during the block may have requests of so many pages."""
    with open("/proc/sys/fs/fuse/max_pages_limit", "r+b", buffering=0) as limit:
        fcntl.flock(limit, fcntl.LOCK_EX)  # against other workers
        before = os.pread(limit.fileno(), 100, 0)
        os.pwrite(limit.fileno(), b"%d" % pages, 0)
        try:
            yield
        finally:
            os.pwrite(limit.fileno(), before, 0)


@pytest.mark.parametrize(("pages", "requests"), [(256, 4), (512, 2), (1024, 1), (65535, 1)])
@pytest.mark.parametrize("source", ["memory:", "engine"])
def test_requests_are_as_large_as_the_administrator_allows(
    pages: int, requests: int, source: str, place: Path
) -> None:
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(mmap.mmap(-1, 4 << 20))  # starts at a page
        data[:] = pattern(len(data))
        options = ["direct_io"]
        if source == "engine":
            source = stack.enter_context(serving("na+sm")).address
            options.append(f"provider_id={PROVIDER_ID}")
        with requests_of(pages):
            mount = stack.enter_context(mounting(source, place, *options))
        stack.enter_context(watchdog(mount, LIMIT))

        with opened(mount.path / "file", os.O_RDWR | os.O_CREAT) as fd:
            assert os.pwrite(fd, data, 0) == len(data)
            with mmap.mmap(-1, len(data)) as into:
                assert os.preadv(fd, [into], 0) == len(data)
                assert into[:] == data[:]
        counters = json.loads((mount.path / ".stats").read_text())["operations"]
        assert counters["write"]["count"] == counters["read"]["count"] == requests
        with opened(mount.path / "file", os.O_WRONLY | os.O_APPEND) as fd:
            assert os.write(fd, data) == len(data)
        assert (mount.path / "file").read_bytes() == 2 * data[:]
