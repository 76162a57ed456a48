"""Owner and permission overrides: ``-o uid=``, ``gid=`` and ``umask=``.

As on file systems that store no owners, an overridden attribute can only be set to the value that
is shown: another owner is refused, another mode is accepted without effect.  Such a mount never
sets a set-ID bit on a stored file, since its caller is not the stored owner.
"""

from __future__ import annotations

import errno
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from warabi._core.attributes import Attributes
from warabi._core.results import OpenedInode
from warabi.errors import path_error
from warabi.in_process.aio_link import AsyncLink
from warabi.protocol.operations import OPERATIONS

_SET_ID = stat.S_ISUID | stat.S_ISGID
_SPECIAL = _SET_ID | stat.S_ISVTX
_CREATES = {
    name: (one.owner, one.position.get("mode"))
    for name, one in OPERATIONS.items()
    if one.owner is not None
}
"""Operations that create something, and the indexes of the owner and of the mode, if any, among
their arguments."""


@dataclass
class Shown:
    """The overrides; None: show the stored value."""

    uid: int | None = None
    gid: int | None = None
    umask: int | None = None

    def __bool__(self) -> bool:
        return self != Shown()

    def attributes(self, stored: Attributes) -> Attributes:
        """Return *stored* with the overrides applied."""
        mode = stored.mode
        if self.umask is not None and not stat.S_ISLNK(mode):
            mode = mode & ~0o777 | 0o777 & ~self.umask
        return stored._replace(
            mode=mode,
            uid=stored.uid if self.uid is None else self.uid,
            gid=stored.gid if self.gid is None else self.gid,
        )

    def made(self, arguments: Sequence[Any], place: int, mode: int | None) -> list[Any]:
        """Return the arguments of a creating operation; its owner is at index *place*."""
        changed = list(arguments)
        if self.uid is not None:
            changed[place] = self.uid
        if self.gid is not None:
            changed[place + 1] = self.gid
        if changed != list(arguments) and mode is not None:
            changed[mode] &= ~_SET_ID  # the caller is not the owner that the file gets
        return changed

    def change(
        self, stored: Attributes, mode: int | None, uid: int | None, gid: int | None
    ) -> tuple[int | None, int | None, int | None]:
        """Return the mode, owner and group to store for a request to set them.

        Raises:
            PathError: EPERM for another owner or group than the one shown.
        """
        for wanted, shown, what in ((uid, self.uid, "uid"), (gid, self.gid, "gid")):
            if wanted is not None and shown not in (None, wanted):
                raise path_error(errno.EPERM, f"chown: the mount has {what}={shown}")
        if mode is not None:
            special = mode & stored.mode & _SPECIAL
            if self.umask is not None:
                mode = stored.mode & 0o777 | special
            else:
                mode = mode & 0o777 | special | mode & stat.S_ISVTX
        return mode, None if self.uid is not None else uid, None if self.gid is not None else gid


class ShownLink:
    """A link to a target that shows its inodes with overridden owners and modes.

    Args:
        link: the link to the target.
        shown: the overrides.
    """

    def __init__(self, link: AsyncLink, shown: Shown) -> None:
        self._link = link
        self._shown = shown
        # Operations on data need no override.
        self.changes = link.changes
        self.size = link.size
        self.write = link.write
        self.read_into = link.read_into
        self.read_some = link.read_some
        self.create_and_write = link.create_and_write
        self.write_vector = link.write_vector
        self.append = link.append
        self.read_vector = link.read_vector

    async def store(self, arguments: Sequence[Any], data: memoryview) -> Attributes | None:
        """See the interface of links."""
        stored = await self._link.store(self._shown.made(arguments, *_CREATES["store"]), data)
        return None if stored is None else self._shown.attributes(stored)

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        if name in _CREATES:
            arguments = self._shown.made(arguments, *_CREATES[name])
        elif name == "setattr" and any(value is not None for value in arguments[1:4]):
            ino, mode, uid, gid, *rest = arguments
            stored = await self._link.call("getattr", (ino,))
            arguments = (ino, *self._shown.change(stored, mode, uid, gid), *rest)
        result = await self._link.call(name, arguments)
        if isinstance(result, Attributes):
            return self._shown.attributes(result)
        if isinstance(result, OpenedInode):
            return result._replace(attributes=self._shown.attributes(result.attributes))
        if name == "readdir":
            return [(entry, self._shown.attributes(found)) for entry, found in result]
        return result
