"""What changed in a target since a subscriber last asked, and on whose behalf."""

from __future__ import annotations

import secrets
from contextvars import ContextVar
from typing import NamedTuple


class Origin:
    """Somebody who changes a target, for as long as a connection lasts."""

    __slots__ = ("salt",)

    def __init__(self) -> None:
        self.salt = secrets.randbits(62)  # tells its versions from those of other connections


ORIGIN: ContextVar[Origin | None] = ContextVar("warabi-origin", default=None)
"""On whose behalf the target is being changed."""
ATTRIBUTES = 0
"""Of an inode: its attributes changed, and its bytes did not."""
CONTENT = 1
"""Of an inode: its bytes, and so its attributes, changed, or it is gone."""


class Changes(NamedTuple):
    """What changed since the last answer.

    Attributes:
        number: of the answer, to be given with the next question.
        everything: anything may have changed.
        inodes: numbers, and ``ATTRIBUTES``, ``CONTENT``, or when (ns since the epoch) a process
            with direct access wrote to that region.
        names: directory and name, and the inode that it means now, 0 for none.
    """

    number: int
    everything: bool
    inodes: dict[int, int]
    names: dict[tuple[int, bytes], int]
