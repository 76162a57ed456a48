"""Ctrl-C arrives between two steps of a call, never within one that must not be cut short.

Python runs a signal's handler in the main thread, between any two instructions.  That of SIGINT
raises ``KeyboardInterrupt`` there: between taking a lock and the block that releases it, or between
two changes that belong together.  So three kinds of code are written with care:

* Locks are taken by ``with lock``, where *lock* is a ``threading.Lock`` itself: no handler runs
  between its acquisition, in C, and the block.  Where it is only tried, the acquisition is a step
  of an assignment, ``(held,) = map(lock.acquire, (False,))``, within the block that releases it: no
  handler runs in the middle of that, either.
* What changes a target's or a connection's state in several steps runs under
  :func:`uninterrupted`: meanwhile SIGINT has a handler that takes note, and its own handler is
  called at the end.  Where such code waits, it calls :func:`check` now and then, at a point where
  it may be given up.
* What only waits is not protected, and gives up what it waited for when an exception passes.

Other signals' handlers should not raise.  Other threads are never interrupted.
"""

from __future__ import annotations

# Not signal.signal, whose conversions to enums take ten times as long as the rest.
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

LOOK_AROUND = 0.1
"""Seconds after which code that waits under :func:`uninterrupted` should :func:`check`."""


class _Held:
    """What came while SIGINT had :meth:`note` as its handler; for the main thread."""

    def __init__(self) -> None:
        self.thread = threading.main_thread().ident
        self.came = False
        self.handler: Any = None  # the program's
        self.note = self._note  # one object, to be recognized

    def _note(self, number: int, frame: object) -> None:
        self.came = True

    def forked(self) -> None:
        held, self.thread = self.thread, threading.get_ident()  # the main thread now, the only one
        if self.thread != held and _signal.getsignal(SIGINT) is self.note:
            # The thread that would have put the handler back is not here.
            _signal.signal(SIGINT, self.handler)


_held = _Held()
os.register_at_fork(after_in_child=_held.forked)


def uninterrupted(call: Callable[..., _T], *arguments: Any) -> _T:
    """``call(*arguments)``, during which Ctrl-C raises nothing; it does so at the end.

    Costs two system calls in the main thread, and nothing in others.
    """
    if threading.get_ident() != _held.thread:
        return call(*arguments)
    handler = _signal.getsignal(SIGINT)
    if not callable(handler) or handler is _held.note:
        return call(*arguments)
    _held.came = False
    _held.handler = handler  # first: another thread may fork from the next step on
    _signal.signal(SIGINT, _held.note)
    # From here on nothing is raised by a signal.
    try:
        return call(*arguments)
    finally:
        _signal.signal(SIGINT, handler)
        if _held.came:
            handler(SIGINT, sys._getframe())


def check() -> None:
    """Under :func:`uninterrupted`: have the signal that came meanwhile be handled now.

    Raises:
        KeyboardInterrupt: or what else the program's handler of SIGINT raises.
    """
    if (
        _held.came
        and threading.get_ident() == _held.thread
        and _signal.getsignal(SIGINT) is _held.note
    ):
        _held.came = False
        _held.handler(SIGINT, sys._getframe())


def waits_held() -> bool:
    """Whether the caller runs under :func:`uninterrupted`, and should not wait for long at once."""
    return threading.get_ident() == _held.thread and _signal.getsignal(SIGINT) is _held.note


def creating(create: Callable[[], _T], undo: Callable[[_T], object]) -> _T:
    """What *create* returns; when Ctrl-C keeps the caller from getting it, *undo* is called with
    it."""
    made: list[_T] = []

    def give_up() -> None:
        while made:
            with contextlib.suppress(errors.Exception):  # it is gone, or out of reach
                undo(made.pop())

    def make() -> None:
        made.append(create())
        try:
            check()
        except BaseException:
            give_up()  # here, so that a second Ctrl-C finds it done
            raise

    try:
        uninterrupted(make)
        return made[0]  # no handler runs between here and the caller's next step
    except BaseException:
        if made:
            uninterrupted(give_up)
        raise


class Wakeup:
    """Wakes one waiting thread; as ``threading.Event``, but clears itself, and a wait that a
    signal's handler interrupts leaves it usable."""

    __slots__ = ("_lock",)

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._lock.acquire()

    def set(self) -> None:
        """Have one call of :meth:`wait` return, the present or the next one."""
        with contextlib.suppress(RuntimeError):  # it is set already
            self._lock.release()

    def wait(self, timeout: float = -1) -> bool:
        """Return at once when it is set, and clear it; False after *timeout* seconds without."""
        return self._lock.acquire(timeout=timeout)
