"""Reports tasks that hold an event loop: that run for long without a checkpoint.

While one task of a Trio loop computes, or blocks other than through Trio, no other task of the
loop runs, and every client of a provider, or every program that uses a mount, waits.
:class:`LoopWatchdog` is a Trio instrument.  It notes when the loop begins to run tasks and when it
waits for input again, which costs two calls of a few hundred nanoseconds in each turn of the loop
and no system call.  A thread checks these notes; when tasks have been running for longer than the
threshold, it takes the stack of the loop's thread and logs one line with it.

The thread checks only while the loop is busy.  When the loop has been idle for ``WATCHDOG_IDLE``
seconds the thread has unused memory collected, where that is short (``gc_pauses.py``), and sleeps
until the loop runs tasks again, which then costs one system call.
"""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Callable
from time import monotonic
from types import FrameType

import trio

from warabi._core import forks
from warabi._core.log_limit import RateLimit
from warabi._core.tuning import LOOP_HOLD, WATCHDOG_IDLE
from warabi.eventloop import gc_pauses

log = logging.getLogger(__name__)
log.addFilter(RateLimit())

SETTING = "WARABI_LOOP_HOLD"
"""Environment variable: seconds after which a held loop is reported; 0 for never."""
_MOST_FRAMES = 12

Report = Callable[[float, str], None]
"""Called with the seconds for which a loop has been held so far, and the stack."""


def _log(seconds: float, stack: str) -> None:
    log.warning("the event loop has been held for %.2f s by %s", seconds, stack)


class LoopWatchdog(trio.abc.Instrument):
    """Watches the loop of one ``trio.run(..., instruments=[watchdog])``.

    Args:
        threshold: seconds for which tasks may run before the loop waits for input again.
        report: called in the watchdog's thread, once for each time that it is longer.
    """

    def __init__(self, threshold: float, report: Report = _log) -> None:
        self._threshold = threshold
        self._report = report
        self._began = 0.0  # when tasks began to run (monotonic clock)
        self._running = False  # whether tasks are running
        self._dozing = False
        self._ended = False
        self._wake = forks.event()
        self._loop = 0
        self._thread = threading.Thread(target=self._watch, name="warabi-watchdog", daemon=True)

    def before_run(self) -> None:
        self._loop = threading.get_ident()
        self._thread.start()

    def after_run(self) -> None:
        self._running = False  # waiting for the thread below is not holding the loop
        self._ended = True
        self._wake.set()
        self._thread.join()

    def after_io_wait(self, timeout: float) -> None:
        self._began = monotonic()
        self._running = True
        if self._dozing:
            self._dozing = False
            self._wake.set()

    def before_io_wait(self, timeout: float) -> None:
        self._running = False

    def _watch(self) -> None:
        busy = monotonic()
        reported = 0.0
        while not self._ended:
            self._wake.wait(self._threshold / 2)
            now, began = monotonic(), self._began
            busy = max(busy, now if self._running else began)
            if self._running and began != reported and now - began > self._threshold:
                stack = self._stack()
                if self._ended or self._began != began:
                    continue  # the task yielded meanwhile, so the stack may be another task's
                reported = began
                self._report(now - began, stack)
            elif now - busy > WATCHDOG_IDLE:
                gc_pauses.collect_while_idle()
                self._doze()
                busy = monotonic()

    def _doze(self) -> None:
        """Sleep until the loop runs tasks."""
        self._wake.clear()
        self._dozing = True
        # The loop sets _running before it checks _dozing.
        if not self._running and not self._ended:
            self._wake.wait()
        self._dozing = False
        if not self._ended:
            self._wake.clear()

    def _stack(self) -> str:
        frame = sys._current_frames().get(self._loop)
        return "an unknown task" if frame is None else _shown(frame)


def _shown(frame: FrameType | None) -> str:
    """Format the innermost frames of a stack in one line."""
    calls: list[str] = []
    while frame is not None and len(calls) < _MOST_FRAMES:
        code = frame.f_code
        name = os.path.basename(code.co_filename)
        calls.append(f"{code.co_qualname} ({name}:{frame.f_lineno})")
        frame = frame.f_back
    return " < ".join(calls)


def instruments() -> list[trio.abc.Instrument]:
    """Return the Trio instruments for the loop of a provider or mount: a watchdog, unless the
    environment variable disables it."""
    text = os.environ.get(SETTING, "")
    try:
        threshold = float(text) if text else LOOP_HOLD
    except ValueError:
        threshold = LOOP_HOLD
        log.warning("%s: %r is not a number of seconds; using %g s", SETTING, text, LOOP_HOLD)
    return [LoopWatchdog(threshold)] if threshold > 0 else []
