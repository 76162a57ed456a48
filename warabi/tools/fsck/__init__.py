"""Finding and repairing damage of targets on a file system, while nobody has them open.

``check`` is the whole of it.  Rules:

* What is wrong is said, what is done about it is said, and nothing is deleted that is nowhere
  else: files go to ``PATH.lost+found/`` beside the target, regions and other inodes without a
  place in the tree to ``/lost+found`` in it, and rows that cannot be kept are written down in
  ``PATH.lost+found/fsck.log``.
* Without *repair*, nothing changes but what any opening changes: SQLite replays its WAL.
* What opening a target that was not closed puts right by itself is no damage.
"""

from __future__ import annotations

from warabi.tools.fsck.check import check
from warabi.tools.fsck.report import Report

__all__ = ["Report", "check"]
