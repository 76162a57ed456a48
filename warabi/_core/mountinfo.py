"""The mount table ``/proc/self/mountinfo``, and identities of file systems."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from warabi._core.procfs import unescaped

KIND = "fuse.warabifs"
"""The type of our mounts in the mount table."""


@dataclass(frozen=True)
class Mounted:
    """An entry of the mount table."""

    path: str
    root: str  # the directory of the file system that is mounted, / unless it is a bind mount
    device: str  # major:minor
    kind: str
    source: str
    options: dict[str, str]  # of the file system, such as user_id

    @property
    def owner(self) -> int:
        """The user who mounted it."""
        return int(self.options.get("user_id") or -1)


def mounts() -> list[Mounted]:
    """Return all mounts, without accessing them; of several at one path the last one is visible."""
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        kind, source, settings = [*right.split(" "), "", ""][:3]
        words = left.split(" ")
        pairs = (setting.partition("=")[::2] for setting in settings.split(","))
        path, root = _text(words[4]), _text(words[3])
        found.append(Mounted(path, root, words[2], kind, _text(source), dict(pairs)))
    return found


def _text(field: str) -> str:
    return os.fsdecode(unescaped(os.fsencode(field)))


def mounted_on(path: str) -> Mounted | None:
    """Return the visible mount at the absolute path *path*."""
    return next((mount for mount in reversed(mounts()) if mount.path == path), None)


def mount_of(path: str) -> Mounted | None:
    """Return the visible mount that the absolute path *path* is on, without accessing it; None if
    the mount table has none, as in a chroot."""
    visible = {mount.path: mount for mount in mounts()}  # the last one at each path
    while path not in visible and path != "/":
        path = os.path.dirname(path)
    return visible.get(path)


def device_number(path: str) -> str:
    """Return ``major:minor`` of the mount at *path*; empty if it was unmounted."""
    mount = mounted_on(path)
    return mount.device if mount else ""


_FILE_SYSTEMS = Path("/sys/class/bdi")


def identity(device: str) -> int:
    """Return a number that identifies the file system, and is not reused along with its device
    number; 0 if it is gone, or sysfs is not mounted."""
    try:
        return os.stat(_FILE_SYSTEMS / device).st_ino
    except OSError:
        return 0


def is_gone(device: str, number: int) -> bool:
    """Whether the file system of a device number with the :func:`identity` *number* is unmounted in
    all mount namespaces; False if that is unknown."""
    return bool(number) and identity(device) != number and _FILE_SYSTEMS.is_dir()
