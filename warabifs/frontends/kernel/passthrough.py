"""Passthrough: files that the kernel reads and writes without this process (``-o passthrough``).

The region's own descriptor backs the open file (Linux 6.14, for root).  The kernel requires all
opens of an inode to be alike: while one may be open normally, further opens are normal, too.  A
file that was just closed may still count as open here, which is safe.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from dataclasses import dataclass

from warabi import errors
from warabi.in_process.occupancy import wait_free
from warabi.region import RegionID
from warabi.target.target import Target
from warabifs.frontends.kernel.session import FuseSession

log = logging.getLogger(__name__)

_IN_VAIN = {
    errno.EPERM: "root of a container may not have the kernel use descriptors",
    errno.ELOOP: "the target lies on a file system, such as overlayfs, that has others below",
    errno.EINVAL: "the kernel does not take descriptors of the target's file system",
    errno.EOPNOTSUPP: "the kernel does not take descriptors of the target's file system",
}
"""Reasons why the kernel rejects this descriptor, and will reject all others."""


@dataclass(slots=True)
class _Passed:
    """An open inode, and the kernel's ID of its backing file."""

    region: RegionID
    backing: int
    openings: int = 1


class Passing:
    """Decides which open files of a mount use passthrough.

    Args:
        target: in this process.
        session: with the kernel.
    """

    def __init__(self, target: Target, session: FuseSession) -> None:
        self._target = target
        self._session = session
        self._passed: dict[int, _Passed] = {}  # by inode
        self._usual: Counter[int] = Counter()  # opens of other inodes
        self._in_vain = False
        self._told: set[int] = set()  # errnos that were logged

    def open(self, region: RegionID, flags: int) -> int:
        """Return the kernel's backing ID for a pinned file that is being opened with *flags* of
        open(2); 0 for a normal open.

        Opens with synchronous writes are normal: the kernel would sync data, but not the metadata
        needed to find them.
        """
        ino = region.slot
        passed = self._passed.get(ino)
        if passed is not None:
            passed.openings += 1
            return passed.backing
        usual = self._in_vain or flags & os.O_DSYNC or self._usual[ino] or self._target.occupied
        backing = 0 if usual else self._back(region)
        if backing:
            self._passed[ino] = _Passed(region, backing)
        else:
            self._usual[ino] += 1
        return backing

    def _back(self, region: RegionID) -> int:
        try:
            fd = self._target.expose(region)
            return 0 if fd is None else self._session.register_backing(fd)
        except errors.WouldBlock:
            return 0
        except (errors.Exception, OSError) as error:
            self._target.kernel_backed.conceal(region)
            number = error.errno or 0 if isinstance(error, OSError) else 0
            self._in_vain = number in _IN_VAIN
            if number not in self._told:
                self._told.add(number)
                log.warning("passthrough is not used: %s", _IN_VAIN.get(number, error))
            return 0

    def is_cache_true(self, ino: int) -> bool:
        """Whether the kernel's page cache is valid for a file that is being opened normally: not if
        the file may have used passthrough before."""
        return self._usual[ino] > 1

    async def release(self, ino: int) -> None:
        """Record that a file was closed; it is still pinned."""
        passed = self._passed.get(ino)
        if passed is None:
            self._usual[ino] -= 1
            if not self._usual[ino]:
                del self._usual[ino]
            return
        await wait_free(self._target)  # until then the file counts as open
        passed.openings -= 1
        if not passed.openings:
            del self._passed[ino]
            self._session.unregister_backing(passed.backing)
            self._target.kernel_backed.conceal(passed.region)
