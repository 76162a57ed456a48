"""Calls in worker threads for Trio programs, at half the cost of ``trio.to_thread``.

The threads are Trio's own.  Starting a call saves one turn of Trio's loop and naming the thread;
completing it saves two turns, since the waiting task is woken through its own eventfd.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from contextvars import copy_context
from functools import partial
from typing import TypeVar

import outcome
import trio

_T = TypeVar("_T")
_KEPT = 16
"""Eventfds to keep for reuse; a burst of waiting tasks creates more."""


class Signals:
    """Eventfds that each wake one task at a time; some are kept for reuse."""

    def __init__(self) -> None:
        self._idle: list[int] = []
        trio.lowlevel.spawn_system_task(self._close_at_the_end)

    async def _close_at_the_end(self) -> None:
        try:
            await trio.sleep_forever()
        finally:
            for fd in self._idle:
                os.close(fd)

    def take(self) -> int:
        return self._idle.pop() if self._idle else os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

    async def wait(self, fd: int) -> None:
        """Return when *fd* was written to, even if the task is cancelled; releases it."""
        with trio.CancelScope(shield=True):
            await trio.lowlevel.wait_readable(fd)
        os.eventfd_read(fd)
        if len(self._idle) < _KEPT:
            self._idle.append(fd)
        else:
            os.close(fd)


_signals: trio.lowlevel.RunVar[Signals] = trio.lowlevel.RunVar("warabi-signals")


def _this_run() -> Signals:
    """Return the eventfds of this run of Trio."""
    try:
        return _signals.get()
    except LookupError:
        made = Signals()
        _signals.set(made)
        return made


async def in_thread(call: Callable[[], _T], limiter: trio.CapacityLimiter | None = None) -> _T:
    """Run *call* in a worker thread, limited by *limiter* or Trio's default limiter.

    It has the task's context.  Once started it runs to its end, and is waited for, even if the
    task is cancelled.
    """
    await trio.lowlevel.checkpoint_if_cancelled()
    async with _Limited(limiter or trio.to_thread.current_default_thread_limiter()):
        ours = _this_run()
        fd = ours.take()
        done: list[outcome.Outcome[_T]] = []

        def deliver(result: outcome.Outcome[_T]) -> None:
            done.append(result)
            os.eventfd_write(fd, 1)

        trio.lowlevel.start_thread_soon(partial(copy_context().run, call), deliver)
        await ours.wait(fd)
        return done[0].unwrap()


class _Limited:
    """Holds one of *limiter*'s tokens in the block, without a checkpoint if one is available."""

    def __init__(self, limiter: trio.CapacityLimiter) -> None:
        self._limiter = limiter

    async def __aenter__(self) -> None:
        try:
            self._limiter.acquire_on_behalf_of_nowait(self)
        except trio.WouldBlock:
            await self._limiter.acquire_on_behalf_of(self)

    async def __aexit__(self, *exc: object) -> None:
        self._limiter.release_on_behalf_of(self)
