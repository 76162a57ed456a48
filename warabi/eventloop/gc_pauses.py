"""Bounds how long Python's garbage collector stops a process that has many objects, and empties the
interpreter's free lists while the process is idle.

A full collection visits every object, which takes 0.1 s or more per million, and stops all
threads.  Mounts and providers have objects for each inode, name and region in use, and create
hardly any reference cycles.  So the objects that survive a long full collection are *frozen*: later
collections do not visit them.  Frozen objects are still freed with their last reference; only
cycles of frozen objects that become garbage later are never found.

Full collections also empty the interpreter's free lists of tuples, floats and others.  Without
them, after each burst of work some of these unused objects remain in memory arenas (1 MiB) that
are otherwise empty, which keeps the interpreter from returning those to the kernel.
"""

from __future__ import annotations

import gc
from time import perf_counter

from warabi._core.tuning import GC_HOLD

_THRESHOLDS = (10_000, 5, 5)
"""New objects per collection of the youngest generation, and collections per older generation.

Requests create no cycles, so collecting after every 700 objects is useless.  With these values a
full collection visits some 300,000 unfrozen objects.
"""


class PauseLimit:
    """A callback of the collector that freezes the survivors of long collections."""

    def __init__(self) -> None:
        self._began = 0.0

    def __call__(self, phase: str, info: dict[str, int]) -> None:
        if phase == "start":
            self._began = perf_counter()
        elif info["generation"] == 2 and perf_counter() - self._began > GC_HOLD:
            gc.freeze()


def limit_pauses() -> None:
    """Freeze objects that survive a full collection of more than ``GC_HOLD`` seconds.

    For processes that only serve: it changes the collector of the whole process.
    """
    if not _limited():
        gc.set_threshold(*_THRESHOLDS)
        gc.callbacks.append(PauseLimit())


def _limited() -> bool:
    return any(isinstance(callback, PauseLimit) for callback in gc.callbacks)


def collect_while_idle() -> None:
    """Do a full collection, if :func:`limit_pauses` was called, which makes it short."""
    if _limited():
        gc.collect()
