"""The caller of a task's operations, which may stop waiting before they end.

An operation that was sent must still be waited for, because the provider may have allocated
something that must be released.  But an operation that was not sent yet is not sent, and one whose
reply was lost is not repeated: others may have changed its object in the meantime.
"""

from __future__ import annotations

from contextvars import ContextVar


class Caller:
    """A caller.

    Attributes:
        gone: it no longer waits for the result.
    """

    __slots__ = ("gone",)

    def __init__(self) -> None:
        self.gone = False


CALLER: ContextVar[Caller | None] = ContextVar("warabi-caller", default=None)
"""The caller of the current task."""


def is_gone() -> bool:
    """Whether the current task's caller no longer waits."""
    caller = CALLER.get()
    return caller is not None and caller.gone
