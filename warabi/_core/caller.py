"""Whoever waits for the calls that a task makes, and may stop waiting before they end.

A call that was sent has to be waited for even so, because the provider may have taken something
for it that is to be given back.  But one that was not sent yet is not sent any more, nor is one
sent again whose reply was lost: by then others may have changed what it would change.
"""

from __future__ import annotations

from contextvars import ContextVar


class Caller:
    """One of them.

    Attributes:
        gone: it does not wait for the result any more.
    """

    __slots__ = ("gone",)

    def __init__(self) -> None:
        self.gone = False


CALLER: ContextVar[Caller | None] = ContextVar("warabi-caller", default=None)
"""Of the current task."""


def is_gone() -> bool:
    """Whether the current task works for a caller that is gone."""
    caller = CALLER.get()
    return caller is not None and caller.gone
