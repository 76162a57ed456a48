"""Finding and repairing damage of targets on a file system, while they are not open.

The entry point is ``check``.  Rules:

* Every problem and every repair is reported, and nothing is deleted that has no copy elsewhere:
  files are moved to ``PATH.lost+found/`` beside the target, regions and other inodes without a
  place in the tree to its ``/lost+found``, and rows that cannot be kept are written to
  ``PATH.lost+found/fsck.log``.
* Without *repair*, nothing changes except what any opening changes: SQLite replays its WAL.
* Whatever opening a target after a crash repairs by itself is not damage.
"""

from __future__ import annotations

from warabi.tools.fsck.check import check
from warabi.tools.fsck.report import Report

__all__ = ["Report", "check"]
