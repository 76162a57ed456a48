"""Unmounting that waits until everything is persisted, and reports what is not.

Used by ``umount.fuse.warabifs``, which umount(8) calls, and by ``warabifs umount``.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
from collections.abc import Sequence

from warabi._core.mountinfo import KIND, Mounted, identity, is_gone, mounted_on, mounts
from warabi._core.syscalls import MNT_DETACH, MNT_FORCE, UMOUNT_NOFOLLOW, umount2
from warabi._core.tuning import LAZY_PATIENCE, UNMOUNT_PATIENCE
from warabi.errors import ConfigError
from warabifs.mount.shutdown_socket import Waiting
from warabifs.mount.utab import remove_stale


def main(arguments: Sequence[str]) -> int:
    """Run the helper of umount(8): ``umount.TYPE PLACE [-flnrv] [-N NAMESPACE] [-t TYPE]``.

    Returns:
        the exit status.
    """
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
    return unmount(mount, lazy=parsed.l, patience=UNMOUNT_PATIENCE, force=parsed.f)


def find(place: str) -> Mounted:
    """Return the mount on *place*, or of the source *place*.

    Raises:
        ConfigError: there is none.
    """
    # Access only the parent directory: the mount point itself may be dead, or block.
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
    """Unmount, and wait for the mount process; reports errors on stderr.

    Args:
        mount: the mount.
        lazy: keep open files usable; waits for a second only.
        patience: seconds to wait for the process.
        force: abort pending requests (root only).

    Returns:
        the exit status: 0 if everything is persisted, or the file system is still mounted
        elsewhere (a bind mount, another mount namespace), whose unmount will report; the status
        of the failed unmount; or 1, also if the mount process cannot be asked, or was killed.
    """
    before = identity(mount.device)
    waiting = Waiting(mount, before)
    try:
        status = _detach(mount.path, lazy, force)
        if status:
            return status
        if not waiting.killed and _is_mounted_elsewhere(mount, before, lazy):
            return 0
        if waiting.reason:
            _say(mount, f"it is not known whether everything is persisted: {waiting.reason}")
            return 1
        report = waiting.wait_report(LAZY_PATIENCE if lazy else patience)
    finally:
        waiting.close()
        remove_stale()
    process = f"process {waiting.pid}"
    if report is None and lazy:
        _say(mount, f"{process} continues until the last file is closed and everything persisted")
        return 0
    if report is None:
        text = f"is still persisting {mount.source} after {patience:g} s; it continues"
        _say(mount, f"{process} {text}")
    elif report:
        _say(mount, f"not everything is persisted: {report}")
    return 0 if report == "" else 1


def _say(mount: Mounted, text: str) -> None:
    print(f"umount.warabifs: {mount.path}: is unmounted, but {text}", file=sys.stderr)


def _is_mounted_elsewhere(mount: Mounted, before: int, lazy: bool) -> bool:
    """Whether the kernel keeps the file system, which was just unmounted from one mount point.

    *before* is its identity.  After a lazy unmount open files also keep it, so only the mounts
    that are visible here count.
    """
    if is_gone(mount.device, before):
        return False  # the number may belong to another mount by now
    if any(other.device == mount.device for other in mounts()):
        return True
    return bool(before) and not lazy


def _detach(path: str, lazy: bool, force: bool) -> int:
    if os.geteuid() != 0:
        return subprocess.run(["fusermount3", "-u", *(["-z"] if lazy else []), path]).returncode
    # Not by umount(8): it accesses the mount, whose process may be waiting for its provider.
    try:
        umount2(path, UMOUNT_NOFOLLOW | lazy * MNT_DETACH | force * MNT_FORCE)
    except OSError as error:
        print(f"umount.warabifs: {path}: {error.strerror}", file=sys.stderr)
        return 32  # the exit status of umount(8) for a failed unmount
    return 0
