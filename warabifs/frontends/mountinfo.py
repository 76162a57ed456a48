"""The list of mounts in ``/proc/self/mountinfo``, and which file systems the kernel has."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from warabi._core.procfs import unescaped


@dataclass(frozen=True)
class Mounted:
    """A line of the list of mounts."""

    path: str
    device: str  # major:minor
    kind: str
    source: str
    options: dict[str, str]  # of the file system: user_id and the like

    @property
    def owner(self) -> int:
        """The user who mounted it."""
        return int(self.options.get("user_id") or -1)


def mounts() -> list[Mounted]:
    """What is mounted, without asking any of it; of several on one place the last is seen."""
    found = []
    for line in os.fsdecode(Path("/proc/self/mountinfo").read_bytes()).split("\n")[:-1]:
        left, _, right = line.partition(" - ")
        kind, source, settings = [*right.split(" "), "", ""][:3]
        words = left.split(" ")
        pairs = (setting.partition("=")[::2] for setting in settings.split(","))
        found.append(Mounted(_text(words[4]), words[2], kind, _text(source), dict(pairs)))
    return found


def _text(field: str) -> str:
    return os.fsdecode(unescaped(os.fsencode(field)))


def mounted_on(path: str) -> Mounted | None:
    """What is seen at the mount point *path*, an absolute one."""
    return next((mount for mount in reversed(mounts()) if mount.path == path), None)


def device_number(path: str) -> str:
    """``major:minor`` of what is mounted on *path*; empty when it is gone already."""
    mount = mounted_on(path)
    return mount.device if mount else ""


_FILE_SYSTEMS = Path("/sys/class/bdi")


def identity(device: str) -> int:
    """A number that the file system of this device number has, and none that has the device number
    later; 0 when it is gone, or sysfs is not mounted."""
    try:
        return os.stat(_FILE_SYSTEMS / device).st_ino
    except OSError:
        return 0


def is_gone(device: str, number: int) -> bool:
    """Whether the kernel has no longer, in any mount namespace, the file system of a device number
    whose :func:`identity` was *number*; False when that cannot be told."""
    return bool(number) and identity(device) != number and _FILE_SYSTEMS.is_dir()
