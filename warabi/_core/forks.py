"""What becomes of engines, targets and connections in a child that os.fork(2) makes.

The child has a copy of the memory, and shares open file descriptions with its parent: sockets,
locks (flock(2)), memory, SQLite's files.  Of the threads it has only the one that forked, so a lock
that another one held is never released there.  Rules:

* Everything that owns a lock, a descriptor or a target registers here (:func:`register`).  In the
  child its ``_forked`` is called before any other code runs.
* ``_forked`` takes no lock, waits for nothing and sends nothing.  It replaces locks by new ones,
  gives up what is the parent's, and leaves the object so that each later call either works by
  means of the child's own (a new connection) or raises at once.
* Descriptors of the parent's are replaced by ones of ``/dev/null`` (:func:`disconnect`): the number
  stays in use, so whatever closes it later closes nothing else, and the parent's file, lock,
  socket or memory is not kept by the child.

Children that end up in execve(2), as those of ``subprocess`` do, do not come here: all descriptors
are closed on exec.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import weakref
from collections.abc import Callable, Iterable
from typing import Any, Protocol

log = logging.getLogger(__name__)


class Forked(Protocol):
    def _forked(self) -> None:
        """Called in a forked child, see the module."""


_registered: weakref.WeakSet[Forked] = weakref.WeakSet()
_registered_last: weakref.WeakSet[Forked] = weakref.WeakSet()


def register(thing: Forked, *, last: bool = False) -> None:
    """Have ``thing._forked()`` called in every forked child, for as long as *thing* lives; with
    *last* after those of all others."""
    (_registered_last if last else _registered).add(thing)


def disconnect(descriptors: Iterable[int]) -> None:
    """Replace *descriptors*, copies of the parent's, by ones of ``/dev/null``."""
    null = -1
    try:
        for fd in descriptors:
            if null < 0:
                try:
                    null = os.open(os.devnull, os.O_RDWR | os.O_CLOEXEC)
                except OSError:  # no descriptor is left: the first that is given up makes room
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
    """The descriptors of this process whose files' names are *wanted*."""
    found = []
    for number in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # the listing's own
            name = os.readlink(f"/proc/self/fd/{number}").removesuffix(" (deleted)")
            if wanted(name):
                found.append(int(number))
    return found


def keep_for_ever(thing: Any) -> None:
    """Have *thing* never be deallocated, not even when the interpreter ends."""
    ctypes.pythonapi.Py_IncRef(ctypes.py_object(thing))


def _in_child() -> None:
    things = [*_registered, *_registered_last]
    if not things:
        return
    for thing in things:
        try:
            thing._forked()
        except Exception:  # the others must be reached all the same
            log.exception("a forked child could not give up %r", type(thing).__name__)
    # Memory that is shared: with the parent, or with a provider that the parent is a client of.
    with contextlib.suppress(OSError):
        disconnect(descriptors(lambda name: name.startswith("/memfd:warabi-")))


os.register_at_fork(after_in_child=_in_child)
