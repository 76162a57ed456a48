"""Entries in ``/run/mount/utab``, libmount's table, which make umount(8) call our helper.

When root unmounts, umount(8) reads only the type from the kernel, which is "fuse" for every FUSE
file system, and looks for a helper only if the mount point is in that table.  Without an entry it
would unmount without waiting until everything is persisted.  umount(8) removes the entry.

The entry of a mount whose process was killed stays, so that the helper can report that its state
is unknown.  If it is unmounted in another way, the next mount or unmount removes the entry.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from pathlib import Path

from warabifs.frontends.kernel.mountinfo import mounts
from warabifs.mount.shutdown_socket import live_devices

log = logging.getLogger(__name__)

_TABLE = Path("/run/mount/utab")
_OPTION = b"uhelper=warabifs"


@functools.cache
def _libmount() -> ctypes.CDLL | None:
    try:
        library = ctypes.CDLL("libmount.so.1")
    except OSError:
        return None
    pointer, text = ctypes.c_void_p, ctypes.c_char_p
    library.mnt_new_update.restype = library.mnt_new_fs.restype = pointer
    for name in ("mnt_fs_set_source", "mnt_fs_set_target", "mnt_fs_set_options"):
        getattr(library, name).argtypes = [pointer, text]
    library.mnt_update_set_fs.argtypes = [pointer, ctypes.c_ulong, text, pointer]
    library.mnt_update_table.argtypes = [pointer, pointer]
    library.mnt_free_update.argtypes = library.mnt_unref_fs.argtypes = [pointer]
    return library


class UtabEntry:
    """The entry of a mount by root, whose umount(8) needs it and who may write it.

    Args:
        source: as in the mount table.
        mountpoint: an absolute path.
    """

    def __init__(self, source: str, mountpoint: str) -> None:
        self._source = os.fsencode(source)
        self._mountpoint = os.fsencode(mountpoint)

    def add(self) -> None:
        """Add it, unless it exists, such as from a killed process."""
        if not self._is_last():
            self._update(remove=False)

    def remove(self) -> None:
        """Remove it, unless umount(8) has done so, or another mount added an entry there since."""
        if self._is_last():
            self._update(remove=True)

    def _is_last(self) -> bool:
        """Whether this is the newest entry of the mount point."""
        of_mountpoint = [fields for fields in _lines() if b"TARGET=" + self._mountpoint in fields]
        wanted = {b"SRC=" + self._source, b"OPTS=" + _OPTION}
        return bool(of_mountpoint) and wanted <= set(of_mountpoint[-1])

    def _update(self, *, remove: bool) -> None:
        _update(self._source, self._mountpoint, remove=remove)


def remove_stale() -> None:
    """Remove the entries of killed mounts that are not mounted any more.

    A mount that is not visible here may be in another mount namespace.  So nothing is removed while
    the process of an invisible mount lives.
    """
    lines = _lines() if os.geteuid() == 0 else []
    ours = [fields for fields in lines if b"OPTS=" + _OPTION in fields]
    if not ours:
        return
    live = live_devices(0)  # before mounts(), or a mount could appear in between
    here = mounts()
    mounted = {b"TARGET=" + os.fsencode(mount.path) for mount in here}
    # An entry is removed by its mount point, so no other entry may have the same one.
    kept = {_target(fields) for fields in lines if fields not in ours}
    stale = {_target(fields) for fields in ours} - mounted - kept
    if stale and live <= {mount.device for mount in here}:
        for fields in ours:
            if _target(fields) in stale:
                _update(b"", _target(fields).removeprefix(b"TARGET="), remove=True)


def _lines() -> list[list[bytes]]:
    """Return the fields of each line of the table."""
    try:
        lines = _TABLE.read_bytes().splitlines()
    except OSError:
        return []
    return [[_plain(field) for field in line.split(b" ")] for line in lines]


def _target(fields: list[bytes]) -> bytes:
    """Return the field with the mount point."""
    return next((field for field in fields if field.startswith(b"TARGET=")), b"")


def _update(source: bytes, mountpoint: bytes, *, remove: bool) -> None:
    library = _libmount()
    if library is None or os.geteuid() != 0:
        return
    update, entry = library.mnt_new_update(), library.mnt_new_fs()
    try:
        library.mnt_fs_set_source(entry, source)
        library.mnt_fs_set_target(entry, mountpoint)
        library.mnt_fs_set_options(entry, _OPTION)
        if remove:
            status = library.mnt_update_set_fs(update, 0, mountpoint, None)
        else:
            status = library.mnt_update_set_fs(update, 0, None, entry)
        status = status or library.mnt_update_table(update, None)
    finally:
        library.mnt_unref_fs(entry)
        library.mnt_free_update(update)
    if status < 0:
        log.info("%s: not updated: %s", _TABLE, os.strerror(-status))


def _plain(field: bytes) -> bytes:
    """Decode the octal escapes of a field."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
