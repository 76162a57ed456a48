"""Owner and permissions as ``-o uid=``, ``gid=`` and ``umask=`` want them, whatever is stored.

As on file systems that store no owners: what is overridden can be set to what it is already;
another owner is refused, another mode is accepted without effect.  Nothing that happens through
such a mount gives a stored file a set-id bit, for the one who sets it is not the stored owner.
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
from warabi.local.aio_link import AsyncLink
from warabi.protocol.operations import OPERATIONS

_SET_ID = stat.S_ISUID | stat.S_ISGID
_SPECIAL = _SET_ID | stat.S_ISVTX
_OWNER_AT = {name: one.owner for name, one in OPERATIONS.items() if one.owner is not None}
"""Operations that make something, and which of their arguments are its owner and group."""


@dataclass
class Shown:
    """What is shown instead of what is stored; None: what is stored."""

    uid: int | None = None
    gid: int | None = None
    umask: int | None = None

    def __bool__(self) -> bool:
        return self != Shown()

    def attributes(self, stored: Attributes) -> Attributes:
        """*stored*, as others get to see it."""
        mode = stored.mode
        if self.umask is not None and not stat.S_ISLNK(mode):
            mode = mode & ~0o777 | 0o777 & ~self.umask
        return stored._replace(
            mode=mode,
            uid=stored.uid if self.uid is None else self.uid,
            gid=stored.gid if self.gid is None else self.gid,
        )

    def made(self, arguments: Sequence[Any], place: int) -> list[Any]:
        """The arguments of an operation that makes something; its owner is at *place*."""
        changed = list(arguments)
        if self.uid is not None:
            changed[place] = self.uid
        if self.gid is not None:
            changed[place + 1] = self.gid
        if changed != list(arguments) and isinstance(changed[2], int):
            changed[2] &= ~_SET_ID  # of the owner that it gets, not of the one who asks
        return changed

    def change(
        self, stored: Attributes, mode: int | None, uid: int | None, gid: int | None
    ) -> tuple[int | None, int | None, int | None]:
        """What to store when mode, owner and group are set to these.

        Raises:
            PathError: another owner or group than the one shown.
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
    """A target whose inodes have the owners and modes that *shown* says.

    Args:
        link: reaches the target.
        shown: overrides something.
    """

    def __init__(self, link: AsyncLink, shown: Shown) -> None:
        self._link = link
        self._shown = shown
        # What concerns bytes alone goes straight through.
        self.changes = link.changes
        self.size = link.size
        self.write = link.write
        self.read_into = link.read_into
        self.read_some = link.read_some
        self.create_and_write = link.create_and_write
        self.write_vector = link.write_vector
        self.append = link.append
        self.read_vector = link.read_vector

    async def call(self, name: str, arguments: Sequence[Any]) -> Any:
        if name in _OWNER_AT:
            arguments = self._shown.made(arguments, _OWNER_AT[name])
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
