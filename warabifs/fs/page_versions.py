"""Page versions: whether the kernel may keep its cached pages of a file when it is opened.

The reply to each open has a *version* of the file's bytes, which changes when another client
changes them.  This mount's own writes go through its page cache and do not change it.  (Clients on
the provider's host write by direct access, which the provider cannot attribute: there a mount
writes past the page cache, and drops the pages that it has written.)

When the version differs the kernel is notified to drop its pages, and does so when it processes the
reply.  Until then any other open must get the same answer; so the version is recorded at the first
use of the open file.
"""

from __future__ import annotations

from warabi._core.attributes import Attributes
from warabi.aio import Target
from warabifs.fs.handles import File


class PageVersions:
    """The versions of the file contents that the kernel has cached.

    Args:
        target: the target.
        alone: no other client changes it.
    """

    def __init__(self, target: Target, *, alone: bool) -> None:
        self._target = target
        self._alone = alone
        self._versions: dict[int, int] = {}
        self.notified = False
        """Whether the provider's versions tell other clients' changes from this mount's own: where
        it is on another host, and no client has direct access."""

    async def pin(self, ino: int) -> tuple[Attributes, int]:
        """Pin an inode for an open file; returns its attributes, and the version of its bytes."""
        if self.notified:
            attributes, version = await self._target.call("open", ino)
            return attributes, version
        attributes = await self._target.call("pin", ino)
        return attributes, attributes.ctime_ns  # the ctime also changes with our own writes

    def opened(self, file: File, version: int) -> bool:
        """Whether the kernel may keep its cached pages of a file that is being opened."""
        if self._alone or self._versions.get(file.ino) == version:
            return True
        file.version = version
        return False

    def used(self, file: File) -> None:
        """Record that the kernel has processed the reply to the open of *file*."""
        if file.version is not None:
            self._versions[file.ino] = file.version
            file.version = None

    def made(self, ino: int) -> None:
        """Record that this mount created a file, which no other client has changed."""
        if self.notified:
            self._versions[ino] = 0

    def forget(self, ino: int) -> None:
        """Forget the version of a file: the kernel drops its pages, or may have no valid ones."""
        self._versions.pop(ino, None)

    def forget_all(self) -> None:
        """As :meth:`forget`, of all files."""
        self._versions.clear()
