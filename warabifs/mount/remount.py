"""``mount -o remount``: the kernel's flags of a mount that is there.

The mount's process has no part in it.  mount(8) hands over all flags, those of the table of
mounts and fstab included, and calls this for what it cannot do itself, having a helper.
"""

from __future__ import annotations

import os

from warabi._core.syscalls import MOUNT_FLAGS, mount
from warabi.errors import ConfigError, PermissionDenied


def remount(path: str, flags: set[str], *, read_only: bool) -> None:
    """Give the mount on *path* the flags, and no others.

    Raises:
        PermissionDenied: only root may.
        ConfigError: the kernel refuses, for instance since files are open for writing.
    """
    if os.geteuid() != 0:
        raise PermissionDenied(f"mount point {path}: only root can remount")
    flags = {"remount", *flags} | ({"ro"} if read_only else set())
    bits = sum(bit for flag, bit in MOUNT_FLAGS.items() if flag in flags)
    # Not with mount(8): it would hand over the file system's own options, which newer kernels
    # refuse to see again.
    try:
        mount("none", path, bits)
    except OSError as error:
        raise ConfigError(f"mount point {path}: remount: {error.strerror}") from None
