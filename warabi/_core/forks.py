"""State of engines, targets and connections in a child process after fork(2).

The child has a copy of the memory, and shares open file descriptions with its parent: sockets,
locks (flock(2)), memory, SQLite's files.  Of the threads it has only the one that forked, so a lock
that another thread held is never released there.  Rules:

* Everything that owns a lock, a descriptor or a target registers here (:func:`register`).  In the
  child its ``_forked`` is called before any other code runs.
* ``_forked`` takes no lock, does not block and sends nothing.  It replaces locks by new ones,
  releases what belongs to the parent, and leaves the object so that each later call either works
  with the child's own resources (a new connection) or raises at once.
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
