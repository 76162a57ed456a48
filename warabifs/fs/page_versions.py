"""Which files the page cache has as they are: whether it may keep what it has at an opening.

The provider tells a *version* of the bytes with each opening: it is another one when somebody else
has changed them.  What this mount writes goes through the page cache, which knows it.  (On the
provider's host nobody can tell: there a mount writes past it, and drops what it has written.)

When a version is another one the kernel is told to drop what it has, and does so when it takes note
of the answer.  Until then somebody else who opens the file must be told the same; so the version
counts from the first use of the open file on.
"""

from __future__ import annotations

from warabi import errors
from warabi._core.attributes import ROOT, Attributes
from warabi.aio import Target
from warabifs.fs.handles import File


class PageVersions:
    """The versions of what the kernel has of a target's files.

    Args:
        target: where they are.
        alone: nobody else changes them.
    """

    def __init__(self, target: Target, *, alone: bool) -> None:
        self._target = target
        self._alone = alone
        self._versions: dict[int, int] = {}
        self.told = False
        """Whether the provider tells changes of others from those of this mount."""

    async def learn(self) -> None:
        """Find out what the provider tells."""
        if not self._alone:
            self.told = True
            await self.pin(ROOT)
            await self._target.call("unpin", ROOT, 1)

    async def pin(self, ino: int) -> tuple[Attributes, int]:
        """Keep an inode for an open file; its attributes, and the version of its bytes."""
        if self.told:
            try:
                attributes, version = await self._target.call("open", ino)
                return attributes, version
            except errors.ProtocolError:
                self.told = False  # an older provider
        attributes = await self._target.call("pin", ino)
        return attributes, attributes.ctime_ns  # another one also after changes of our own

    def opened(self, file: File, version: int) -> bool:
        """Whether the kernel may keep what it has of a file that is being opened."""
        if self._alone or self._versions.get(file.ino) == version:
            return True
        file.version = version
        return False

    def used(self, file: File) -> None:
        """The kernel has taken note that *file* was opened."""
        if file.version is not None:
            self._versions[file.ino] = file.version
            file.version = None

    def made(self, ino: int) -> None:
        """A file was made by this mount: nobody else has changed it."""
        if self.told:
            self._versions[ino] = 0

    def forget(self, ino: int) -> None:
        """The kernel drops what it has, or nothing is known of it."""
        self._versions.pop(ino, None)

    def forget_all(self) -> None:
        """As :meth:`forget`, of all files."""
        self._versions.clear()
