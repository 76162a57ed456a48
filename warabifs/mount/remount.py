"""``mount -o remount``: the kernel's flags of a mount that is there.

The mount's process has no part in it.  mount(8) hands over all flags, those of the table of
mounts and fstab included, and calls this for what it cannot do itself, having a helper.
"""

from __future__ import annotations

import ctypes
import os

from warabi.errors import ConfigError, PermissionDenied

_REMOUNT = 32
_FLAGS = {
    "nosuid": 2, "nodev": 4, "noexec": 8, "sync": 16, "dirsync": 128, "noatime": 1024,
    "nodiratime": 2048, "relatime": 1 << 21, "strictatime": 1 << 24,
}  # fmt: skip


def remount(path: str, flags: set[str], *, read_only: bool) -> None:
    """Give the mount on *path* the flags, and no others.

    Raises:
        PermissionDenied: only root may.
        ConfigError: the kernel refuses, for instance since files are open for writing.
    """
    if os.geteuid() != 0:
        raise PermissionDenied(f"mount point {path}: only root can remount")
    bits = _REMOUNT | int(read_only)
    for flag in flags:
        bits |= _FLAGS.get(flag, 0)
    # Not with mount(8): it would hand over the file system's own options, which newer kernels
    # refuse to see again.
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(path), None, ctypes.c_ulong(bits), None):
        raise ConfigError(f"mount point {path}: remount: {os.strerror(ctypes.get_errno())}")
