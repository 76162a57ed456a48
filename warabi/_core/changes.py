"""Changes of a target since a subscriber's last query, and the connection that made a change."""

from __future__ import annotations

import os
from contextvars import ContextVar
from typing import NamedTuple


class Origin:
    """Identifies a connection that changes a target."""

    __slots__ = ("salt",)

    def __init__(self) -> None:
        self.salt = int.from_bytes(os.urandom(8)) >> 2  # makes its versions unique


ORIGIN: ContextVar[Origin | None] = ContextVar("warabi-origin", default=None)
"""The connection on whose behalf the current task changes the target."""
ATTRIBUTES = 0
"""Of an inode: its attributes changed, but not its data."""
CONTENT = 1
"""Of an inode: its data, and so its attributes, changed, or it was removed."""


class Changes(NamedTuple):
    """The changes since the last reply.

    Attributes:
        number: number of the reply, to be sent with the next query.
        everything: anything may have changed.
        inodes: inode numbers, and ``ATTRIBUTES``, ``CONTENT``, or the time (ns since the epoch) of
            a write by direct access to that region.
        names: directory and name, and the inode that it refers to now, 0 for none.
    """

    number: int
    everything: bool
    inodes: dict[int, int]
    names: dict[tuple[int, bytes], int]
