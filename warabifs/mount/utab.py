"""An entry in ``/run/mount/utab``, libmount's table, by which umount(8) calls our helper.

Of what root unmounts, umount(8) asks the kernel for the type alone, which says "fuse" of every
FUSE file system, and looks no further unless the mount point is in that table.  It would unmount
then without waiting until everything is persisted.  umount(8) removes the entry afterwards.

The entry of a mount whose process was killed stays, so that umount(8) tells what is not known of
it.  If it is unmounted otherwise, the next mount or unmounting removes the entry.
"""

from __future__ import annotations

import ctypes
import functools
import logging
import os
import re
from pathlib import Path

from warabifs.frontends.mountinfo import mounts
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
    """The entry of a mount, for root, whose umount(8) needs it and who may write it.

    Args:
        source: as the list of mounts shows it.
        mountpoint: an absolute path.
    """

    def __init__(self, source: str, mountpoint: str) -> None:
        self._source = os.fsencode(source)
        self._mountpoint = os.fsencode(mountpoint)

    def add(self) -> None:
        """Add it, if it is not there, such as from a process that was killed."""
        if not self._is_last():
            self._update(remove=False)

    def remove(self) -> None:
        """Remove it, unless umount(8) has done so, or another mount has an entry there since."""
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
    """Remove the entries of mounts that were killed, and are not mounted any more.

    What is not mounted here may be in another mount namespace.  So nothing is removed while a mount
    lives that is not seen from here.
    """
    lines = _lines() if os.geteuid() == 0 else []
    ours = [fields for fields in lines if b"OPTS=" + _OPTION in fields]
    if not ours:
        return
    live = live_devices(0)  # before what is mounted, or one could come in between
    here = mounts()
    mounted = {b"TARGET=" + os.fsencode(mount.path) for mount in here}
    # By its mount point alone an entry is removed, so that it must be all that there is.
    kept = {_target(fields) for fields in lines if fields not in ours}
    stale = {_target(fields) for fields in ours} - mounted - kept
    if stale and live <= {mount.device for mount in here}:
        for fields in ours:
            if _target(fields) in stale:
                _update(b"", _target(fields).removeprefix(b"TARGET="), remove=True)


def _lines() -> list[list[bytes]]:
    """The fields of each line of the table."""
    try:
        lines = _TABLE.read_bytes().splitlines()
    except OSError:
        return []
    return [[_plain(field) for field in line.split(b" ")] for line in lines]


def _target(fields: list[bytes]) -> bytes:
    """The field of the mount point."""
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
    """A field of the table, whose special characters are written in octal."""
    return re.sub(rb"\\([0-7]{3})", lambda match: bytes([int(match[1], 8)]), field)
