"""Entries in ``/run/mount/utab``, libmount's table, which make umount(8) call our helper.

When root unmounts, umount(8) reads only the type from the kernel, which is "fuse" for every FUSE
file system, and looks for a helper only if the mount point is in that table.  Without an entry it
would unmount without waiting until everything is persisted.  umount(8) removes the entry.

The entry of a mount whose process was killed stays, so that the helper can report that its state
is unknown.  If it is unmounted in another way, the next mount or unmount removes the entry: it
contains the identity of its file system, in a field that libmount keeps for helpers.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from pathlib import Path

from warabi._core.mountinfo import device_number, identity, is_gone
from warabi._core.procfs import unescaped

log = logging.getLogger(__name__)

_TABLE = Path("/run/mount/utab")
_OPTION = b"uhelper=warabifs"
_ATTRIBUTE = re.compile(rb"ATTRS=(?:.*,)?warabifs=([0-9]+:[0-9]+)/([0-9]+)(?:,.*)?")


@functools.cache
def _libmount() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libmount.so.1")
    except OSError:
        return None
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.mnt_new_update.restype = library.mnt_new_fs.restype = pointer
    for name in ("source", "target", "options", "attributes"):
        getattr(library, f"mnt_fs_set_{name}").argtypes = [pointer, text]
    library.mnt_update_set_fs.argtypes = [pointer, ctypes.c_ulong, text, pointer]
    library.mnt_update_table.argtypes = [pointer, pointer]
    library.mnt_free_update.argtypes = library.mnt_unref_fs.argtypes = [pointer]
    return library


class UtabEntry:
    """The entry of a mount by root.  Only umount(8) by root needs it, and only root may write it.

    Args:
        source: as in the mount table.
        mountpoint: an absolute path.
    """

    def __init__(self, source: str, mountpoint: str) -> None:
        self._source = os.fsencode(source)
        self._mountpoint = os.fsencode(mountpoint)

    def add(self) -> None:
        """Add it, for what is mounted there now."""
        device = device_number(os.fsdecode(self._mountpoint))
        _update(self._source, self._mountpoint, f"warabifs={device}/{identity(device)}".encode())

    def remove(self) -> None:
        """Remove it, unless umount(8) has done so, or another mount added an entry there since."""
        of_mountpoint = [fields for fields in _lines() if b"TARGET=" + self._mountpoint in fields]
        wanted = {b"SRC=" + self._source, b"OPTS=" + _OPTION}
        if of_mountpoint and wanted <= set(of_mountpoint[-1]):
            _update(self._source, self._mountpoint)


def remove_stale() -> None:
    """Remove the entries of killed mounts that are not mounted any more in any mount namespace."""
    lines = _lines() if os.geteuid() == 0 else []
    # An entry is removed by its mount point, so no other entry may have the same one.
    kept = {_target(fields) for fields in lines if not _is_stale(fields)}
    for fields in lines:
        if _target(fields) not in kept:
            _update(b"", _target(fields).removeprefix(b"TARGET="))


def _is_stale(fields: list[bytes]) -> bool:
    found = next(filter(None, map(_ATTRIBUTE.fullmatch, fields)), None)
    return found is not None and is_gone(os.fsdecode(found[1]), int(found[2]))


def _lines() -> list[list[bytes]]:
    """Return the fields of each line of the table."""
    try:
        lines = _TABLE.read_bytes().splitlines()
    except OSError:
        return []
    return [[unescaped(field) for field in line.split(b" ")] for line in lines]


def _target(fields: list[bytes]) -> bytes:
    """Return the field with the mount point."""
    return next((field for field in fields if field.startswith(b"TARGET=")), b"")


def _update(source: bytes, mountpoint: bytes, attributes: bytes | None = None) -> None:
    """Add an entry, with *attributes*; without, remove the newest one of the mount point."""
    library = _libmount()
    if library is None or os.geteuid() != 0:
        return
    update, entry = library.mnt_new_update(), library.mnt_new_fs()
    try:
        library.mnt_fs_set_source(entry, source)
        library.mnt_fs_set_target(entry, mountpoint)
        library.mnt_fs_set_options(entry, _OPTION)
        library.mnt_fs_set_attributes(entry, attributes)
        if attributes is None:
            status = library.mnt_update_set_fs(update, 0, mountpoint, None)
        else:
            status = library.mnt_update_set_fs(update, 0, None, entry)
        status = status or library.mnt_update_table(update, None)
    finally:
        library.mnt_unref_fs(entry)
        library.mnt_free_update(update)
    if status < 0:
        log.info("%s: not updated: %s", _TABLE, os.strerror(-status))
