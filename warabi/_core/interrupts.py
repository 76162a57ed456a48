"""Deferring Ctrl-C (SIGINT) while the state of an object is changed in several steps.

Python runs a signal's handler in the main thread, between any two instructions.  That of SIGINT
raises ``KeyboardInterrupt`` there: between taking a lock and the block that releases it, or between
two changes that belong together.  So four kinds of code follow rules:

* Locks are taken by ``with lock``, where *lock* is a ``threading.Lock`` itself: no handler runs
  between its acquisition, in C, and the block.  A non-blocking acquisition is part of an
  assignment, ``(held,) = map(lock.acquire, (False,))``, within the block that releases it: no
  handler runs in the middle of that, either.
* Code that changes a target's or a connection's state in several steps runs under
  :func:`uninterrupted`: during that time SIGINT has a handler that only records it, and the
  original handler is called at the end.  If such code waits, it calls :func:`check` periodically,
  at a point where it may be abandoned.
* A function whose result must not be lost is written in Python and called without ``*arguments``,
  by each of its callers in turn: no handler runs between its return and the caller's next step.
* Code that only waits is not protected, and cleans up when an exception passes.

Handlers of other signals should not raise.  Threads other than the main thread are never
interrupted.
"""

from __future__ import annotations

# Not signal.signal, whose enum conversions take ten times as long as the call.
import _signal  # type: ignore[import-not-found]
import contextlib
import os
import sys
import threading
from collections.abc import Callable
from signal import SIGINT
from typing import Any, TypeVar

from warabi import errors

_T = TypeVar("_T")


class _Held:
    """The state of the deferral: whether SIGINT arrived, and its original handler."""

    def __init__(self) -> None:
        self.thread = threading.main_thread().ident
        self.came = False
        self.handler: Any = None  # the program's handler
        self.note = self._note  # one object, so that it can be compared

    def _note(self, number: int, frame: object) -> None:
        self.came = True

    def forked(self) -> None:
        held = self.thread
        self.thread = threading.get_ident()  # now the main thread
        if self.thread != held and _signal.getsignal(SIGINT) is self.note:
            # The thread that would restore the handler does not exist here.
            _signal.signal(SIGINT, self.handler)


_held = _Held()
os.register_at_fork(after_in_child=_held.forked)


def uninterrupted(call: Callable[..., _T], *arguments: Any) -> _T:
    """Call ``call(*arguments)``, deferring Ctrl-C until it returns.

    Costs two system calls in the main thread, and nothing in other threads.
    """
    if threading.get_ident() != _held.thread:
        return call(*arguments)
    handler = _signal.getsignal(SIGINT)
    if not callable(handler) or handler is _held.note:
        return call(*arguments)
    _held.came = False
    _held.handler = handler  # before signal(): another thread may fork at any time
    _signal.signal(SIGINT, _held.note)
    # From here on no signal handler raises.
    try:
        return call(*arguments)
    finally:
        _signal.signal(SIGINT, handler)
        if _held.came:
            handler(SIGINT, sys._getframe())


def check() -> None:
    """Under :func:`uninterrupted`: handle a deferred signal now.

    Raises:
        KeyboardInterrupt: or whatever the program's handler of SIGINT raises.
    """
    if (
        _held.came
        and threading.get_ident() == _held.thread
        and _signal.getsignal(SIGINT) is _held.note
    ):
        _held.came = False
        _held.handler(SIGINT, sys._getframe())


def waits_held() -> bool:
    """Whether the caller runs under :func:`uninterrupted`, and should not wait long at once."""
    return threading.get_ident() == _held.thread and _signal.getsignal(SIGINT) is _held.note


def remove_all(made: list[_T], undo: Callable[[_T], object]) -> None:
    """Call *undo* with each of *made*, and empty that; an interrupted *undo* is not repeated."""
    while made:
        with contextlib.suppress(errors.Exception):  # already removed, or not reachable
            undo(made.pop())


def creating(create: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
    """Return the result of *create*; if Ctrl-C prevents that, call *undo* with the result."""
    made: list[_T] = []

    def make() -> None:
        made.append(create())
        try:
            check()
        except BaseException:
            remove_all(made, undo)  # here, so that a second Ctrl-C does not interrupt it
            raise

    try:
        uninterrupted(make)
        return made[0]  # no handler runs before the caller's next instruction
    except BaseException:
        while made:
            try:  # not suppress(), which is Python code itself and could be interrupted
                uninterrupted(remove_all, made, undo)
            except BaseException:  # the next Ctrl-C, before the call deferred it
                continue
        raise


class Wakeup:
    """Wakes one waiting thread; like ``threading.Event``, but clears itself, and stays usable if a
    signal handler interrupts a wait."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Make one call of :meth:`wait` return, the current or the next one."""
        with contextlib.suppress(RuntimeError):  # already set
            self._lock.release()

    def wait(self, timeout: float = -1) -> bool:
        """Wait until it is set, and clear it; returns False after *timeout* seconds."""
        return self._lock.acquire(timeout=timeout)
