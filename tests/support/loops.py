"""Whether anything held an event loop for too long, whatever else the machine does.

What counts is the loop's own processor time; only a wait of seconds counts by the clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

import pytest
import trio

from warabi.eventloop import loop_watchdog
from warabi.eventloop.loop_watchdog import LoopWatchdog

MOST = 0.05
"""Seconds of processor time for which tasks may run before the loop looks for input again."""
_MOST_WAITING = 2.5
_LONG = 4 * MOST
_TIMES = 3


class Hold(NamedTuple):
    """A turn of a loop that took too long.

    Attributes:
        used: seconds of processor time.
        passed: seconds.
        stack: from within it.
    """

    used: float
    passed: float
    stack: str


class ProcessorWatchdog(LoopWatchdog):
    """Notes each turn of a loop that took too long."""

    def __init__(self, held: list[Hold]) -> None:
        super().__init__(MOST, self._seen)
        self._held = held
        self._stacks = ""
        self._used = 0.0

    def _seen(self, seconds: float, stack: str) -> None:
        self._stacks = stack

    def after_io_wait(self, timeout: float) -> None:
        super().after_io_wait(timeout)
        self._stacks = ""
        self._used = time.thread_time()

    def before_io_wait(self, timeout: float) -> None:
        used = time.thread_time() - self._used
        passed = time.monotonic() - self._began
        super().before_io_wait(timeout)
        if self._used and (used > MOST or passed > _MOST_WAITING):
            self._held.append(Hold(used, passed, self._stacks))


@contextmanager
def watched_loops() -> Iterator[list[Hold]]:
    """Within the block, engines that are made watch their loops; gives what held any of them."""
    held: list[Hold] = []
    gc.collect()
    gc.freeze()  # to look through all that the tests have made takes too long, too

    def instruments() -> list[trio.abc.Instrument]:
        return [ProcessorWatchdog(held)]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop_watchdog, "instruments", instruments)
        try:
            yield held
        finally:
            gc.unfreeze()


def check_never_held(held: list[Hold]) -> None:
    """Fail for what held a loop in work done once; a short hold may be an accident."""
    assert [one for one in held if one.used > _LONG or one.passed > _MOST_WAITING] == []
    assert len(held) < _TIMES, held


def check_not_held(held: list[Hold], work: Callable[[], object]) -> None:
    """Do *work*, and fail if a loop is held each time that it is done: once may be an accident."""
    for _ in range(_TIMES):
        held.clear()
        work()
        if not held:
            return
    pytest.fail(f"an event loop was held: {held}")
