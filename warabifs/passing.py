"""Files whose bytes the kernel reads and writes by itself, past this process: ``-o passthrough``.

Behind an open file then stands the region's own descriptor (Linux 6.9, for root).  The kernel wants
all openings of an inode to be alike: as long as one may be open the usual way, the next is
opened so, too.  What has just been closed may still count as open here, which is the safe side.
"""

from __future__ import annotations

import logging
from collections import Counter
from dataclasses import dataclass

from warabi import errors
from warabi.region import RegionID
from warabi.target import Target
from warabifs.session import Session

log = logging.getLogger(__name__)


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

    def __init__(self, target: Target, session: Session) -> None:
        self._target = target
        self._session = session
        self._passed: dict[int, _Passed] = {}  # by inode
        self._usual: Counter[int] = Counter()  # openings of other inodes

    def open(self, region: RegionID) -> int:
        """The kernel's number for what stands behind a file that is being opened and stays pinned;
        0 when it is opened the usual way."""
        ino = region.slot
        passed = self._passed.get(ino)
        if passed is not None:
            passed.openings += 1
            return passed.backing
        backing = 0 if self._usual[ino] else self._back(region)
        if backing:
            self._passed[ino] = _Passed(region, backing)
        else:
            self._usual[ino] += 1
        return backing

    def _back(self, region: RegionID) -> int:
        try:
            fd = self._target.expose(region)
            return 0 if fd is None else self._session.back(fd)
        except (errors.Exception, OSError) as error:
            self._target.conceal(region)
            log.warning("region %s is not passed through: %s", region.hex(), error)
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
            self._target.conceal(passed.region)
