"""From a path on a mount to the target behind it.

A mount answers the extended attribute ``user.warabi.location`` of each of its files and
directories, which is not listed: ``ADDRESS/PROVIDER`` if an engine serves the target, such as
``na+sm://1234-0/7``, otherwise the source that was mounted, such as ``file:/srv/target``.  The
kernel lets those read it who may read the file.
"""

from __future__ import annotations

import fcntl
import os
import stat
from typing import Any, NamedTuple

from warabi import processes
from warabi._core.attributes import LOCATION_XATTR, REGION_XATTR
from warabi._core.mountinfo import KIND, mount_of, mounts
from warabi.client import Client, TargetHandle
from warabi.errors import ConfigError
from warabi.region import RegionID


class Located(NamedTuple):
    """A file of a mount: the target that is mounted, and the region that is the file."""

    target: TargetHandle
    region: RegionID


class MountedPath(NamedTuple):
    """Where a path on a mount is: the engine's address, the provider, the path in the target."""

    address: str
    provider_id: int
    path: str


def locate(path: str | os.PathLike[str] | int, config: dict[str, Any] | None = None) -> Located:
    """Return the target and the region behind a file on a mount, for access without the kernel.

    The handle is read-only if this process may not write the file, or has opened it for reading.
    What a program on the mount has written, and the kernel still keeps, is not seen before the
    program calls fsync(2) or closes the file.

    Args:
        path: of the file, or a descriptor of it.
        config: of the engine that connects, shared by calls with the same: ``timeout``, ``tls``,
            ``token_file``...

    Raises:
        OSError: the path cannot be accessed, or not be read.
        ConfigError: it is not a regular file on a mount of warabifs, or no engine serves the
            target, which then only the mount's process can access.
        PermissionDenied: the engine refuses this process.
        ConnectionFailed, TimedOut: the engine does not respond.
        ProviderNotFound: it does not have the provider any more.
    """
    found = os.stat(path)
    if not _on_mount(found.st_dev):
        raise ConfigError(f"{path}: is not on a mount of warabifs")
    if not stat.S_ISREG(found.st_mode):
        raise ConfigError(f"{path}: is not a regular file, so it has no region")
    address, provider_id = _engine(path, str(path))
    region = RegionID(bytes.fromhex(os.getxattr(path, os.fsdecode(REGION_XATTR)).decode()))
    settings = processes.portable(address, config or {})
    if isinstance(settings, str):
        raise ConfigError(f"locate: {settings}")
    if isinstance(path, int):
        writable = fcntl.fcntl(path, fcntl.F_GETFL) & os.O_ACCMODE != os.O_RDONLY
    else:
        writable = os.access(path, os.W_OK, effective_ids=True)
    engine = processes.engine_for(settings, address)
    target = Client(engine).make_target_handle(address, provider_id, read_only=not writable)
    return Located(target, region)


def mounted_path(text: str) -> MountedPath | None:
    """Return where *text* is in a target, if it is on a mount; None if it is not.

    The last component need not exist, and is not followed if it is a symbolic link.

    Raises:
        ConfigError: no engine serves the target that is mounted there.
        OSError: the directory cannot be accessed.
    """
    above, name = os.path.split(os.path.abspath(text))
    path = os.path.join(os.path.realpath(above), name)
    mount = mount_of(path)
    if mount is None or mount.kind != KIND:
        return None
    address, provider_id = _engine(mount.path, text)
    inside = os.path.relpath(path, mount.path)
    return MountedPath(address, provider_id, os.path.normpath(os.path.join(mount.root, inside)))


def _on_mount(number: int) -> bool:
    """Whether a device number is that of a mount; other file systems store any attribute."""
    device = f"{os.major(number)}:{os.minor(number)}"
    return any(mount.device == device and mount.kind == KIND for mount in mounts())


def _engine(path: str | os.PathLike[str] | int, shown: str) -> tuple[str, int]:
    """Return the address and the provider's ID that the mount of *path* tells."""
    location = os.fsdecode(os.getxattr(path, os.fsdecode(LOCATION_XATTR)))
    address, _, provider_id = location.rpartition("/")
    if "://" not in address or not provider_id.isdecimal():
        raise ConfigError(
            f"{shown}: is on a mount of {location}, which no engine serves; only the mount can"
            " access it"
        )
    return address, int(provider_id)


__all__ = ["Located", "locate"]
