"""Idmapped mounts: another view of a mount, in which files have other owners."""

from __future__ import annotations

import contextlib
import os
import struct
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.mount.support import run, wait_until
from tests.posix.support import AT_FDCWD, check, libc

OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
"""Numbers of system calls, the same on every architecture; the C library may have no functions."""
OPEN_TREE_CLONE = 1
MOVE_MOUNT_F_EMPTY_PATH = 4
AT_EMPTY_PATH = 0x1000
MOUNT_ATTR_IDMAP = 0x100000


@contextlib.contextmanager
def idmapped(path: Path, place: Path, mapping: tuple[int, int, int]) -> Iterator[Path]:
    """*path* mounted on *place*, too, while the block runs.  *mapping*: the first ID of the file
    system's, as what it is shown, and how many."""
    place.mkdir()
    with _namespace(mapping) as namespace:
        flags = OPEN_TREE_CLONE | os.O_CLOEXEC
        tree = check(libc.syscall(OPEN_TREE, AT_FDCWD, os.fsencode(path), flags))
        try:
            attributes = struct.pack("=QQQQ", MOUNT_ATTR_IDMAP, 0, 0, namespace)
            size = len(attributes)
            check(libc.syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, size))
            to = os.fsencode(place)
            check(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, to, MOVE_MOUNT_F_EMPTY_PATH))
        finally:
            os.close(tree)
    try:
        yield place
    finally:
        run("umount", "-l", place)


@contextlib.contextmanager
def _namespace(mapping: tuple[int, int, int]) -> Iterator[int]:
    """A descriptor of a user namespace with *mapping* for users and groups."""
    with subprocess.Popen(["unshare", "--user", "cat"], stdin=subprocess.PIPE) as process:
        directory = Path("/proc", str(process.pid))
        ours = os.readlink("/proc/self/ns/user")
        wait_until(lambda: os.readlink(directory / "ns/user") != ours, "the user namespace")
        for kind in ("uid_map", "gid_map"):
            (directory / kind).write_text(" ".join(map(str, mapping)))
        fd = os.open(directory / "ns/user", os.O_RDONLY)
    try:
        yield fd
    finally:
        os.close(fd)
