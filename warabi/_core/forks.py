"""State of engines, targets and connections in a child process after fork(2).

The child has a copy of the memory, and shares open file descriptions with its parent: sockets,
locks (flock(2)), memory, SQLite's files.  Of the threads it has only the one that forked, so a lock
that another thread held is never released there.  Rules:

* Locks, conditions and events are made here (:func:`lock`, :func:`condition`, :func:`event`), and
  nowhere else: in the child all of them are free, and no thread waits for them.
* Everything that owns a descriptor, a connection or a target registers here (:func:`register`).  In
  the child its ``_forked`` is called before any other code runs, and after locks are free.
* ``_forked`` takes no lock, does not block and sends nothing.  It releases what belongs to the
  parent, forgets calls of the parent's threads, and leaves the object so that each later call
  either works with the child's own resources (a new connection) or raises at once.
* A ``threading.Thread`` of the parent is marked as ended by Python; an event loop of the parent
  does not run in the child, and the child leaves the loop's selectors and tasks alone.
* Descriptors of the parent are replaced by ones of ``/dev/null`` (:func:`disconnect`): the number
  stays in use, so closing it later closes nothing else, and the child does not keep the parent's
  file, lock, socket or memory open.

Children that call execve(2), such as those of ``subprocess``, are not affected: all descriptors
are close-on-exec.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import threading
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Forked(Protocol):
    def _forked(self) -> None:
        """Called in a forked child; see the module's documentation."""


_registered: weakref.WeakSet[Forked] = weakref.WeakSet()
_registered_last: weakref.WeakSet[Forked] = weakref.WeakSet()


def register(thing: Forked, *, last: bool = False) -> None:
    """Have ``thing._forked()`` called in every forked child, as long as *thing* lives; with *last*
    after those without."""
    (_registered_last if last else _registered).add(thing)


class _Renewable(Protocol):
    def _at_fork_reinit(self) -> None:
        """As Python's own modules do it: the lock is free, and its waiters are forgotten."""


_renewable: weakref.WeakSet[_Renewable] = weakref.WeakSet()


def _renewed(made: Any) -> Any:
    _renewable.add(made)
    return made


def lock() -> threading.Lock:
    """Return a new lock, which is free in each forked child."""
    made: threading.Lock = _renewed(threading.Lock())
    return made


def condition(lock: threading.Lock) -> threading.Condition:
    """Return a new condition of *lock*, for which no thread waits in a forked child."""
    made: threading.Condition = _renewed(threading.Condition(lock))
    return made


def event() -> threading.Event:
    """Return a new event; a forked child keeps whether it is set."""
    made: threading.Event = _renewed(threading.Event())
    return made


def disconnect(descriptors: Iterable[int]) -> None:
    """Replace *descriptors*, copies of the parent's, by ones of ``/dev/null``."""
    null = -1
    try:
        for fd in descriptors:
            if null < 0:
                try:
                    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                except OSError:  # out of descriptors: closing the first frees one
                    os.close(fd)
                    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                    if null == fd:
                        null = -1
                        continue
            os.dup2(null, fd, inheritable=False)
    finally:
        if null >= 0:
            os.close(null)


def descriptors(wanted: Callable[[str], bool]) -> list[int]:
    """Return the descriptors of this process whose file names satisfy *wanted*."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the descriptor of the listing itself
            name = os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)")
            if wanted(name):
                found.append(int(number))
    return found


def keep_for_ever(thing: Any) -> None:
    """Never deallocate *thing*, not even when the interpreter exits."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _in_child() -> None:
    for renewable in _renewable:
        renewable._at_fork_reinit()  # noqa: SLF001  # has no public name
    things = [*_registered, *_registered_last]
    if not things:
        return
    for thing in things:
        try:
            thing._forked()  # noqa: SLF001  # not for users of the object
        except Exception:  # continue with the others
            log.exception("a forked child could not close its %s", type(thing).__name__)
    # Memory shared with the parent, or with a provider of which the parent is a client.
    with contextlib.suppress(OSError):
        disconnect(descriptors(lambda name: name.startswith("/memfd:warabi-")))


os.register_at_fork(after_in_child=_in_child)
