"""Whether anything held an event loop for too long, whatever else the machine does.

What counts is the loop's own processor time; only a wait of seconds counts by the clock.
"""

from __future__ import annotations

import gc
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest
import trio

from warabi import loop_watchdog
from warabi.loop_watchdog import LoopWatchdog

MOST = 0.05
"""Seconds of processor time for which tasks may run before the loop looks for input again."""
_MOST_WAITING = 2.5
_TIMES = 3


class ProcessorWatchdog(LoopWatchdog):
    """Notes each turn of a loop that took too much processor time, with a stack from within it."""

    def __init__(self, held: list[str]) -> None:
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
            self._held.append(f"{used:.3f} s of {passed:.3f} s: {self._stacks}")


@contextmanager
def watched_loops() -> Iterator[list[str]]:
    """Within the block, engines that are made watch their loops; gives what held any of them."""
    held: list[str] = []
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


def check_not_held(held: list[str], work: Callable[[], object]) -> None:
    """Do *work*, and fail if a loop is held each time that it is done: once may be an accident."""
    for _ in range(_TIMES):
        held.clear()
        work()
        if not held:
            return
    pytest.fail(f"an event loop was held: {held}")
