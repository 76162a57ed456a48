"""Files whose bytes the kernel reads and writes by itself, past this process: ``-o passthrough``.

Behind an open file then stands the region's own descriptor (Linux 6.14, for root).  The kernel
wants all openings of an inode to be alike: as long as one may be open the usual way, the next is
opened so, too.  What has just been closed may still count as open here, which is the safe side.
"""

from __future__ import annotations

import errno
import logging
import os
from collections import Counter
from dataclasses import dataclass

from warabi import errors
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
"""Why the kernel refuses this descriptor, and will refuse every other one."""


@dataclass(slots=True)
class _Passed:
    """An inode that is open, and the kernel's number for what stands behind it."""

    region: RegionID
    backing: int
    openings: int = 1


class Passing:
    """Which open files of a mount are passed through.

    Args:
        target: in this process.
        session: with the kernel.
    """

    def __init__(self, target: Target, session: FuseSession) -> None:
        self._target = target
        self._session = session
        self._passed: dict[int, _Passed] = {}  # by inode
        self._usual: Counter[int] = Counter()  # openings of other inodes
        self._in_vain = False
        self._told: set[int] = set()  # what has been logged, by errno

    def open(self, region: RegionID, flags: int) -> int:
        """The kernel's number for what stands behind a file that is being opened with the *flags*
        of open(2), and stays pinned; 0 when it is opened the usual way.

        So is one whose writes are to be synced: the kernel would sync bytes, and not what is needed
        to find them.
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
            return 0 if fd is None else self._session.back(fd)
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
        """Whether the kernel's page cache is true of a file that is being opened the usual way:
        not where it may have been passed through before."""
        return self._usual[ino] > 1

    def release(self, ino: int) -> None:
        """A file was closed; it is pinned still."""
        passed = self._passed.get(ino)
        if passed is None:
            self._usual[ino] -= 1
            if not self._usual[ino]:
                del self._usual[ino]
            return
        passed.openings -= 1
        if not passed.openings:
            del self._passed[ino]
            self._session.let_go(passed.backing)
            self._target.kernel_backed.conceal(passed.region)
