"""Unmounting that returns when everything is persisted, or says what is not.

``umount.fuse.warabifs``, which umount(8) calls, and ``warabifs umount``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from warabi._core.syscalls import MNT_DETACH, MNT_FORCE, UMOUNT_NOFOLLOW, umount2
from warabi.errors import ConfigError
from warabifs.frontends.mountinfo import Mounted, mounted_on, mounts
from warabifs.mount.shutdown_socket import Waiting, identity
from warabifs.mount.utab import remove_stale

PATIENCE = 60.0
"""Default seconds to wait for the end of the mount's process."""
_LAZY_PATIENCE = 1.0
"""As much for a lazy unmounting, which may have to wait for programs to close their files."""
KIND = "fuse.warabifs"


def main(arguments: Sequence[str]) -> int:
    """The helper of umount(8), which calls ``umount.TYPE PLACE [-flnrv] [-N NAMESPACE] [-t TYPE]``;
    returns the exit status."""
    parser = argparse.ArgumentParser(prog="umount.warabifs")
    parser.add_argument("place", metavar="MOUNTPOINT|SOURCE")
    for flag in "flnrv":
        parser.add_argument(f"-{flag}", action="store_true")
    parser.add_argument("-N", dest="namespace")
    parser.add_argument("-t", dest="kind")
    parsed = parser.parse_intermixed_args(arguments)
    if parsed.namespace:
        enter = ["nsenter", f"--mount={parsed.namespace}", "--"]
        rest = [f"-{flag}" for flag in "flnrv" if getattr(parsed, flag)]
        again = [sys.executable, "-P", "-m", "warabifs.mount.helper", "umount", parsed.place, *rest]
        return subprocess.run([*enter, *again]).returncode
    try:
        mount = find(parsed.place)
    except ConfigError as error:
        print(f"umount.warabifs: {error}", file=sys.stderr)
        return 1
    return unmount(mount, lazy=parsed.l, patience=PATIENCE, force=parsed.f)


def find(place: str) -> Mounted:
    """The mount on *place*, or of the source *place*.

    Raises:
        ConfigError: there is none.
    """
    # The mount point itself may be dead, or wait for its process; only what is above is asked.
    path = os.path.abspath(place)
    path = os.path.join(os.path.realpath(os.path.dirname(path)), os.path.basename(path))
    found = mounted_on(path) or mounted_on(os.path.realpath(path))
    if found is not None and found.kind == KIND:
        return found
    for mount in reversed(mounts()):
        if mount.kind == KIND and mount.source == place:
            return mount
    raise ConfigError(f"{place}: no warabifs is mounted there")


def unmount(mount: Mounted, *, lazy: bool, patience: float, force: bool = False) -> int:
    """Unmount, and wait for the mount's process; says on standard error what went wrong.

    Args:
        mount: what to unmount.
        lazy: let open files go on; waits for a second only.
        patience: seconds to wait for the process.
        force: abort requests that are under way, for root.

    Returns:
        The exit status: 0 when everything is persisted, or the file system is still mounted
        elsewhere (a bind mount, another mount namespace), whose unmounting will tell; that of what
        refused to unmount; or 1, also when the mount's process cannot be asked.
    """
    name = f"umount.warabifs: {mount.path}"
    before = identity(mount.device)
    waiting = Waiting(mount)
    try:
        status = _let_go(mount.path, lazy, force)
        if status:
            return status
        if _is_mounted_elsewhere(mount, before, lazy):
            return 0
        if waiting.reason:
            print(
                f"{name}: is unmounted, but whether everything is persisted is not known:"
                f" {waiting.reason}", file=sys.stderr,
            )  # fmt: skip
            return 1
        word = waiting.word(_LAZY_PATIENCE if lazy else patience)
    finally:
        waiting.close()
        remove_stale()
    if word is None and lazy:
        print(
            f"{name}: process {waiting.pid} goes on until the last file is closed and everything is"
            " persisted", file=sys.stderr,
        )  # fmt: skip
        return 0
    if word is None:
        print(
            f"{name}: is unmounted, but process {waiting.pid} is still persisting {mount.source}"
            f" after {patience:g} s; it goes on", file=sys.stderr,
        )  # fmt: skip
        return 1
    if word:
        print(f"{name}: is unmounted, but not everything is persisted: {word}", file=sys.stderr)
        return 1
    return 0


def _is_mounted_elsewhere(mount: Mounted, before: int, lazy: bool) -> bool:
    """Whether the kernel goes on with the file system, which was just unmounted on one mount point.

    *before* is its identity.  After a lazy unmounting open files alone keep it, so that only the
    mounts that can be seen count.
    """
    if before and identity(mount.device) != before:
        return False  # the number may be another's by now
    if any(other.device == mount.device for other in mounts()):
        return True
    return bool(before) and not lazy


def _let_go(path: str, lazy: bool, force: bool) -> int:
    if os.geteuid() != 0:
        return subprocess.run(["fusermount3", "-u", *(["-z"] if lazy else []), path]).returncode
    # Not by umount(8): it asks the mount, whose process may be waiting for its provider.
    try:
        umount2(path, UMOUNT_NOFOLLOW | lazy * MNT_DETACH | force * MNT_FORCE)
    except OSError as error:
        print(f"umount.warabifs: {path}: {error.strerror}", file=sys.stderr)
        return 32  # as umount(8) says that unmounting failed
    return 0
