"""``mount -o remount``: changes the kernel's flags of an existing mount.

The mount process takes no part in it.  mount(8) passes all flags, those of the mount table and
fstab included, and leaves the remount to this helper since there is one.
"""

from __future__ import annotations

import os

from warabi._core.syscalls import MOUNT_FLAGS, mount
from warabi.errors import ConfigError, PermissionDenied


def remount(path: str, flags: set[str], *, read_only: bool) -> None:
    """Set the flags of the mount on *path*, and clear all others.

    Raises:
        PermissionDenied: the caller is not root.
        ConfigError: the kernel refuses, for instance since files are open for writing.
    """
    if os.geteuid() != 0:
        raise PermissionDenied(f"mount point {path}: only root can remount")
    flags = {"remount", *flags} | ({"ro"} if read_only else set())
    bits = sum(bit for flag, bit in MOUNT_FLAGS.items() if flag in flags)
    # Not by mount(8): it would pass the file system's own options, which newer kernels reject on a
    # remount.
    try:
        mount("none", path, bits)
    except OSError as error:
        raise ConfigError(f"mount point {path}: remount: {error.strerror}") from None
