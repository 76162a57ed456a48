"""Files by handle, as an NFS server uses them: ``name_to_handle_at``, ``open_by_handle_at``."""

from __future__ import annotations

import ctypes
import errno
import functools
import os
import struct
from pathlib import Path

import pytest

from tests.mount.support import SOURCES, Mount, fails_with, mounting, wait_until

EVERYWHERE = pytest.mark.parametrize("mounted", SOURCES, indirect=True)

_LIBC = ctypes.CDLL(None, use_errno=True)
_HEAD = struct.Struct("=Ii")  # bytes that follow, type
_AT_FDCWD = -100


def handle_of(path: Path) -> bytes:
    buffer = ctypes.create_string_buffer(_HEAD.pack(128, 0), _HEAD.size + 128)
    mount_id = ctypes.c_int()
    if _LIBC.name_to_handle_at(_AT_FDCWD, os.fsencode(path), buffer, ctypes.byref(mount_id), 0):
        raise OSError(ctypes.get_errno(), "name_to_handle_at", str(path))
    size, _ = _HEAD.unpack_from(buffer.raw)
    return buffer.raw[: _HEAD.size + size]


def open_handle(mount: Path, handle: bytes, flags: int = os.O_RDONLY) -> int:
    where = os.open(mount, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fd: int = _LIBC.open_by_handle_at(where, ctypes.create_string_buffer(handle), flags)
        if fd < 0:
            raise OSError(ctypes.get_errno(), "open_by_handle_at")
        return fd
    finally:
        os.close(where)


def read_handle(mount: Path, handle: bytes) -> bytes:
    with open(open_handle(mount, handle), "rb") as file:
        return file.read()


def is_stale(mount: Path, handle: bytes) -> bool:
    try:
        os.close(open_handle(mount, handle))
    except OSError as error:
        return error.errno == errno.ESTALE
    return False


def drop_caches() -> None:
    Path("/proc/sys/vm/drop_caches").write_text("2")


@EVERYWHERE
def test_what_the_kernel_has_forgotten_is_found_by_its_handle(mounted: Mount) -> None:
    directory = mounted.path / "a" / "b"
    directory.mkdir(parents=True)
    files = {}
    for number in range(50):
        path = directory / f"file{number}"
        path.write_text(path.name)
        files[path.name] = handle_of(path)
    handles = {mounted.path: handle_of(mounted.path), directory: handle_of(directory)}
    drop_caches()
    for name, handle in files.items():
        assert read_handle(mounted.path, handle) == name.encode()
    for path, handle in handles.items():
        fd = open_handle(mounted.path, handle, os.O_RDONLY | os.O_DIRECTORY)
        try:
            assert os.fstat(fd).st_ino == path.stat().st_ino
            assert os.listdir(fd) == os.listdir(path)
            # The path of a directory that was found so is put together by its "..".
            assert os.readlink(f"/proc/self/fd/{fd}") == str(path)
        finally:
            os.close(fd)
    with open(open_handle(mounted.path, files["file3"], os.O_RDWR), "r+b") as file:
        file.write(b"FILE")
    assert (directory / "file3").read_bytes() == b"FILE3"


@EVERYWHERE
def test_the_handle_of_what_was_removed_is_stale(mounted: Mount) -> None:
    file, directory = mounted.path / "file", mounted.path / "directory"
    file.write_bytes(b"data")
    directory.mkdir()
    handles = [handle_of(file), handle_of(directory)]
    file.unlink()
    directory.rmdir()
    drop_caches()
    for handle in handles:  # The kernel waits neither for RELEASE nor for FORGET.
        wait_until(functools.partial(is_stale, mounted.path, handle), "a stale handle")


@EVERYWHERE
def test_a_handle_of_another_generation_is_stale(mounted: Mount) -> None:
    file = mounted.path / "file"
    file.write_bytes(b"data")
    handle = handle_of(file)
    # The kernel's form: the inode's number in two halves, and the generation.
    size, kind, *words = struct.unpack("=IiIII", handle[:20])
    assert ((words[0] << 32) | words[1]) == file.stat().st_ino
    assert words[2], "the generation of a region is random"
    older = struct.pack("=IiIII", size, kind, *words[:2], words[2] ^ 1) + handle[20:]
    for _ in range(2):
        with fails_with(errno.ESTALE):
            open_handle(mounted.path, older)
        assert read_handle(mounted.path, handle) == b"data"
        drop_caches()


def test_handles_outlive_the_mount_where_the_target_does(place: Path) -> None:
    source = f"file:{place}/target"
    with mounting(source, place) as mount:
        (mount.path / "below").mkdir()
        file, removed = mount.path / "below" / "file", mount.path / "removed"
        for path in (file, removed):
            path.write_text(path.name)
        handles = handle_of(file), handle_of(removed)
        mount.remount()
        assert read_handle(mount.path, handles[0]) == b"file"
        removed.unlink()
        mount.remount()
        (mount.path / "another").write_bytes(b"another")
        with fails_with(errno.ESTALE):
            open_handle(mount.path, handles[1])
        assert read_handle(mount.path, handles[0]) == b"file"
